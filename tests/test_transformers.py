"""The laws of structure for transformers, over tiny Hugging Face models with random weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from test_laws import comparable, random_plan

pytest.importorskip("transformers", reason="needs the package transformers")

from hf_zoo import HF_ZOO, HFCase, make_hf

from curvepress.costs import cost
from curvepress.objective import call, outputs
from curvepress.plan import Plan, after
from curvepress.planner.alignment import Shape
from curvepress.structure import Structure
from curvepress.surgery.cutting import Applied, applied
from curvepress.surgery.masking import masked_output
from curvepress.tracing.watching import trace


@dataclass(frozen=True)
class Pruned:
    case: HFCase
    plan: Plan
    made: Applied


@pytest.fixture(scope="module", params=HF_ZOO)
def pruned(request: pytest.FixtureRequest) -> Pruned:
    case = make_hf(request.param)
    plan = random_plan(trace(case.model, *case.example), 1)
    if "Mixtral" in request.param:  # torch.export cannot follow its routing: only a plan its own code can express will do
        plan = aligned_plan(plan.structure, 1)
    return Pruned(case, plan, applied(case.model, plan, *case.example))


def aligned_plan(structure: Structure, seed: int) -> Plan:
    rng = np.random.default_rng(seed)
    wanted = {g.name: int(rng.integers(max(g.size // 2, 1), g.size + 1)) for g in structure.free}
    widths = Shape(aligned=True).widths(structure, wanted)
    groups = {g.name: g for g in structure.free}
    return Plan(structure, {n: tuple(rng.permutation(groups[n].size)[:k].tolist()) for n, k in widths.items()})


def test_law_2_pruned_is_masked(pruned: Pruned) -> None:
    other = pruned.case.inputs(count=3, seed=5)
    got, wanted = (outputs(x) for x in (call(pruned.made.model, other), masked_output(pruned.case.model, pruned.plan, other)))
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9)


def test_law_4_cost_is_known_without_the_model(pruned: Pruned) -> None:
    assert cost(pruned.plan).params == sum(p.numel() for p in pruned.made.model.parameters())


def test_law_5_tracing_the_result_gives_the_structure_after(pruned: Pruned) -> None:
    assert comparable(trace(pruned.made.model, *pruned.case.example)) == comparable(after(pruned.plan))


def test_law_12_surviving_tensors_keep_their_names(pruned: Pruned) -> None:
    assert pruned.made.model.state_dict().keys() == pruned.case.model.state_dict().keys()


@pytest.mark.parametrize("name", HF_ZOO)
def test_with_aligned_widths_the_models_own_code_serves(name: str) -> None:
    case = make_hf(name)
    made = applied(case.model, aligned_plan(trace(case.model, *case.example), 2), *case.example)
    assert made.form == "module", made.reason
    longer = case.inputs(count=2, seed=5, length=9)
    assert outputs(call(made.model, longer))[0].shape == outputs(call(case.model, longer))[0].shape


@pytest.mark.parametrize("name", ["GPT-2", "Llama, grouped-query", "Gemma"])
def test_generation_with_a_cache_of_keys_and_values(name: str) -> None:
    case = make_hf(name)
    small = applied(case.model, aligned_plan(trace(case.model, *case.example), 3), *case.example).model
    ids = torch.randint(3, 61, (2, 5))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with_cache, without = (
        small.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    )
    assert torch.equal(with_cache, without)
    assert with_cache.shape == (2, 11)


def test_wide_layers_on_the_meta_device() -> None:
    import transformers

    with torch.device("meta"):
        config = transformers.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32)
        structure = trace(transformers.LlamaForCausalLM(config).eval(), {"input_ids": torch.zeros(1, 8, dtype=torch.long)})
    found = {(g.kind, g.size) for g in structure.free}
    assert found == {("embedding", 4096), ("head", 32), ("query-key", 64), ("value", 128), ("hidden", 11008)}
