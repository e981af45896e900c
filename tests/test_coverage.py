"""Transformers: what is found in them, that pruned equals masked, that they load back, and that they generate."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", reason="needs the extra `transformers`")

from hf_zoo import HF_ZOO, make_hf

from curvepress.export import huggingface, to_huggingface
from curvepress.objective import call, outputs
from curvepress.plan import Plan
from curvepress.runs.artifacts import restore, save
from curvepress.structure import Group, Structure
from curvepress.surgery.cutting import Applied, applied, apply
from curvepress.surgery.masking import masked_output
from curvepress.tracing.watching import trace

EVERY = {"embedding", "head", "query-key", "value", "hidden"}
LESS = {
    "ConvNeXt": {"channel", "hidden"},
    "ConvNeXt V2": {"channel", "hidden"},
    "Mixtral": EVERY - {"embedding", "hidden"},
    "Whisper encoder": EVERY - {"embedding"} | {"channel"},  # the residual stream is what the encoder gives back
}
WHOLE = ("embedding", "head", "hidden")
"""Kinds whose channels go without any change to the code of a Hugging Face model."""

Choose = Callable[[Group], tuple[int, ...]]


def half(*kinds: str) -> Choose:
    return lambda g: tuple(range(0, g.size, 2)) if g.kind in kinds else tuple(range(g.size))


def uneven(seed: int, *kinds: str) -> Choose:
    """Random channels, another number in every layer."""
    rng = random.Random(seed)
    return lambda g: tuple(rng.sample(range(g.size), rng.randint(1, g.size))) if g.kind in kinds else tuple(range(g.size))


def plan_of(structure: Structure, choose: Choose) -> Plan:
    return Plan(structure, {g.name: choose(g) for g in structure.free})


def pruned(name: str, choose: Choose) -> tuple[Any, Plan, Applied]:
    case = make_hf(name)
    plan = plan_of(trace(case.model, *case.example), choose)
    return case, plan, applied(case.model, plan, *case.example)


def assert_close(got: Any, wanted: Any, tolerance: float = 1e-9) -> None:
    for a, b in zip(outputs(got), outputs(wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.detach().abs().max()))


@pytest.mark.parametrize("name", HF_ZOO)
def test_every_dimension_is_found(name: str) -> None:
    case = make_hf(name)
    structure = trace(case.model, *case.example)
    assert {g.kind for g in structure.free} >= LESS.get(name, EVERY)
    assert not [g.frozen for g in structure.groups if "no rule" in g.frozen and name != "Mixtral"]


@pytest.mark.parametrize("name", [n for n in HF_ZOO if n != "Mixtral"])
def test_pruned_is_masked_for_other_inputs_and_lengths_and_the_model_stays_a_module(name: str) -> None:
    case, plan, made = pruned(name, uneven(0, *WHOLE))
    assert made.form == "module" and plan.keep
    for inputs in (case.inputs(5, 1), case.inputs(2, 2, 11)):
        assert_close(call(made.model.eval(), inputs), masked_output(case.model, plan, inputs))


@pytest.mark.parametrize(("name", "form"), [("BERT", "graph"), ("Swin", "graph"), ("Llama, grouped-query", "graph"), ("T5", "module")])
def test_any_plan_is_saved_and_restored(name: str, form: str, tmp_path: Path) -> None:
    case, plan, made = pruned(name, uneven(1, *(WHOLE if form == "module" else EVERY)))
    assert made.form == form
    save(made.model, tmp_path / "small.safetensors")
    again = restore(make_hf(name, seed=1).model, plan, tmp_path / "small.safetensors", *case.example)
    other = case.inputs(5, 1)
    assert_close(call(again, other), call(made.model.eval(), other), 0)


# The plain folder.

EXPRESSIBLE = [
    ("Llama, grouped-query", half("hidden"), {"intermediate_size": (48, 24)}),
    ("Llama", half("head", "hidden", "embedding"),
     {"hidden_size": (32, 16), "intermediate_size": (48, 24), "num_attention_heads": (4, 2), "num_key_value_heads": (4, 2)}),
    ("Qwen2", half("head"), {"num_attention_heads": (4, 1), "num_key_value_heads": (2, 1)}),
    ("Llama", half("query-key", "value"), {"head_dim": (8, 4)}),  # every other frequency of the rotation
    ("BERT", half("embedding", "head", "hidden"), {"hidden_size": (32, 16), "intermediate_size": (48, 24), "num_attention_heads": (4, 2)}),
    ("BERT", half("embedding", "query-key", "value", "hidden"), {"hidden_size": (32, 16), "intermediate_size": (48, 24)}),
    ("DistilBERT", half("embedding", "query-key", "value", "hidden"), {"dim": (32, 16), "hidden_dim": (48, 24)}),
    ("GPT-2", half("hidden"), {"n_inner": (48, 24)}),
    ("GPT-2", half("embedding", "query-key", "value"), {"n_embd": (32, 16)}),
    ("ConvNeXt", half("channel", "hidden"), {"hidden_sizes.0": (16, 8), "hidden_sizes.1": (32, 16)}),
    ("Swin", half("embedding", "query-key", "value", "hidden"), {"embed_dim": (16, 8), "hidden_size": (32, 16)}),
    ("ViT", half("hidden", "head"), {"num_attention_heads": (4, 2), "intermediate_size": (48, 24)}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "choose", "fields"), EXPRESSIBLE, ids=lambda v: v if isinstance(v, str) else "")
def test_a_plan_the_configuration_can_express_becomes_a_folder(name: str, choose: Choose, fields: dict[str, Any], tmp_path: Path) -> None:
    case, plan, made = pruned(name, choose)
    written = to_huggingface(made.model, case.model, tmp_path / "small", *case.example)
    assert written.fields == fields and written.relative < 1e-6
    again = type(case.model).from_pretrained(tmp_path / "small", dtype=torch.float64)
    other = case.inputs(5, 1)
    assert_close(call(again, other), masked_output(case.model, plan, other), 1e-6)
    assert {p.name for p in tmp_path.iterdir()} == {"small"}


def test_the_model_inside_a_wrapper_becomes_a_folder(tmp_path: Path) -> None:
    case, _, made = pruned("T5", half("hidden", "head"))
    written = to_huggingface(made.model.model, case.model.model, tmp_path / "small", *case.example)
    assert written.fields == {"d_ff": (48, 24), "num_heads": (4, 2)}


def test_the_folder_needs_no_curvepress(tmp_path: Path) -> None:
    case, _, made = pruned("Llama, grouped-query", half("head", "hidden"))
    to_huggingface(made.model, case.model, tmp_path / "small", *case.example)
    save_file(case.example[0], tmp_path / "inputs")
    script = (
        "import sys; sys.path = [p for p in sys.path if p]; from transformers import AutoModelForCausalLM as A\n"
        "from safetensors.torch import load_file, save_file\n"
        f"m = A.from_pretrained({str(tmp_path / 'small')!r}).double(); y = m(**load_file({str(tmp_path / 'inputs')!r})).logits\n"
        f"save_file({{'logits': y.detach()}}, {str(tmp_path / 'logits')!r}); assert 'curvepress' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, cwd=tmp_path)
    assert_close(load_file(tmp_path / "logits"), {"logits": call(made.model, case.example).logits})


def first_layer_half(group: Group) -> tuple[int, ...]:
    return half("hidden")(group) if ".0." in group.name else tuple(range(group.size))


def low_half(group: Group) -> tuple[int, ...]:
    return tuple(range(group.size // 2 if group.kind in ("query-key", "value") else group.size))


INEXPRESSIBLE = [
    ("Llama", first_layer_half, "intermediate_size .* needs 24, .* needs 48.*nearest .* 48"),
    ("BERT", half("head"), "one hidden_size for all layers.*curvepress.save and curvepress.restore"),
    ("Llama", low_half, "computes something else"),  # frequencies of the rotation follow from head_dim
    ("Llama", uneven(3, "value"), "curvepress.save and curvepress.restore"),
    ("T5", half("hidden"), "Logits is no Hugging Face model"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "choose", "message"), INEXPRESSIBLE, ids=lambda v: v if isinstance(v, str) else "")
def test_what_the_configuration_cannot_express_is_refused(name: str, choose: Choose, message: str, tmp_path: Path) -> None:
    case, _, made = pruned(name, choose)
    with pytest.raises(ValueError, match=message):
        to_huggingface(made.model, case.model, tmp_path / "small", *case.example)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    case, _, made = pruned("Llama", half("hidden"))
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="exists; give the name of a new folder"):
        to_huggingface(made.model, case.model, tmp_path, *case.example)
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]


def test_a_folder_that_computes_something_else_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, _, made = pruned("Llama", half("hidden"))
    loaded = huggingface._loaded

    def shifted(*arguments: Any) -> Any:
        model = loaded(*arguments)
        with torch.no_grad():
            model.lm_head.weight[0] += 0.1
        return model

    monkeypatch.setattr(huggingface, "_loaded", shifted)
    with pytest.raises(ValueError, match="computes something else"):
        to_huggingface(made.model, case.model, tmp_path / "small", *case.example)
    assert not list(tmp_path.iterdir())


# Generation.

GENERATORS = ("Llama, grouped-query", "Mistral", "GPT-2", "T5")
PROMPTS = torch.tensor([[0, 0, 5, 9, 7, 11], [3, 4, 5, 9, 7, 11], [0, 17, 23, 8, 8, 42]])


def generator_of(name: str) -> Any:
    _, _, made = pruned(name, uneven(2, *WHOLE))
    assert made.form == "module"
    return getattr(made.model, "model", made.model) if name == "T5" else made.model


def written(model: Any, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
    fixed = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, **fixed, **options)[:, -6:]


@pytest.mark.parametrize("name", GENERATORS)
def test_generation_is_the_same_with_and_without_a_cache_and_alone_or_padded(name: str) -> None:
    model = generator_of(name)
    mask = (PROMPTS > 0).long()
    cached = written(model, PROMPTS, mask, use_cache=True)
    assert torch.equal(cached, written(model, PROMPTS, mask, use_cache=False))
    for ids, row in zip(PROMPTS, cached, strict=True):
        alone = ids[ids > 0][None]
        assert torch.equal(written(model, alone, torch.ones_like(alone), use_cache=True)[0], row)


@pytest.mark.parametrize("name", ["Llama, grouped-query", "GPT-2"])
def test_step_by_step_with_a_cache_computes_what_the_masked_model_computes_at_once(name: str) -> None:
    case = make_hf(name)
    plan = plan_of(trace(case.model, *case.example), uneven(4, *WHOLE))
    small, ids = apply(case.model, plan, *case.example).eval(), case.inputs(2, 3, 9)[0]["input_ids"]
    wanted, cache = outputs(masked_output(case.model, plan, ({"input_ids": ids},)))[0], None
    for n in range(ids.shape[1]):
        out = small(input_ids=ids[:, n : n + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        torch.testing.assert_close(out.logits[:, 0], wanted[:, n], rtol=1e-9, atol=1e-9)


# The benchmark's own measures.


def test_the_benchmark_tells_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import coverage_laws

    case = coverage_laws.make("ViT, fused qkv by chunk")
    example = case.inputs(2, 0)
    plan = plan_of(trace(case.model, *example), half("hidden"))
    assert coverage_laws.outcome(case, plan, example) == "module"
    monkeypatch.setattr(coverage_laws, "applied", lambda model, plan, *example: Applied(model, "module"))
    assert coverage_laws.outcome(case, plan, example).startswith("WRONG by")


def test_the_rows_a_peer_leaves_are_read_off_and_its_mistakes_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_pruning", reason="needs the extra `bench`")
    from benchmarks import coverage_peer

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 320, 1), torch.nn.Flatten(), torch.nn.Linear(1280, 4)).double()
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    case = coverage_peer.Case("toy", model, lambda count, seed: (x,))
    monkeypatch.setattr(coverage_peer, "make", lambda name: coverage_peer.Case("toy", copy.deepcopy(model), case.inputs))
    small = coverage_peer.pruned(case, (x,), {1: [5, 7, 319]})
    rows = coverage_peer.rows_left(small, model)
    assert list(rows["0.weight", 0]) == [n for n in range(320) if n not in (5, 7, 319)] and rows["2.weight", 1].tolist()[18:22] == [
        18,
        19,
        24,
        25,
    ]
    assert coverage_peer.outcome(case, 0, 4) == "output"
    assert coverage_peer.outcome(case, 1, 320) == "exact"
    fill = coverage_peer.fill

    def spoilt(small: torch.nn.Module, model: torch.nn.Module) -> None:
        fill(small, model)
        small[2].weight.data = small[2].weight.data.roll(1, 1)

    monkeypatch.setattr(coverage_peer, "fill", spoilt)
    assert coverage_peer.outcome(case, 1, 320).startswith("WRONG by")


def test_the_documentation_has_the_tables_of_the_records() -> None:
    from benchmarks import coverage, coverage_table, records

    page = (Path(coverage.__file__).parent.parent / "docs" / "coverage.md").read_text()
    assert coverage_table.table(records.read(coverage.FILE)) in page
