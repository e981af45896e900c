"""Packed files: exact sizes, exact bits, and refusal of anything that is not what was written."""

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvepress.quantization.packing import Packed, load_packed, pack, packed_size, save_packed, unpack
from curvepress.quantization.quantizer import Grid, Scheme, dequantize, fake_quantize, fit_grid, grid, quantize


def as_bits(levels: list[int], bits: int) -> list[int]:
    """The bytes of a bit string, written out digit by digit."""
    string = "".join(f"{level % 2**bits:0{bits}b}"[::-1] for level in levels)
    string += "0" * (-len(string) % 8)
    return [int(string[k : k + 8][::-1], 2) for k in range(0, len(string), 8)]


@given(st.integers(2, 8), st.booleans(), st.data())
def test_levels_take_their_bits_and_no_more(bits: int, signed: bool, data: st.DataObject):
    scheme = Scheme(bits, signed)
    levels = data.draw(st.lists(st.integers(scheme.qmin, scheme.qmax), max_size=40))
    content = pack(torch.tensor(levels, dtype=scheme.dtype), bits)
    assert content.tolist() == as_bits(levels, bits)
    assert len(content) == packed_size(len(levels), bits) == math.ceil(len(levels) * bits / 8)
    back = unpack(content, bits, (len(levels),), signed=signed)
    assert back.dtype == scheme.dtype and back.tolist() == levels


@pytest.mark.parametrize("bits", range(2, 9))
def test_long_tensors_are_packed_in_parts_without_a_seam(bits: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch):
    levels = torch.randint(0, 2**bits, (13, 77), generator=generator).to(torch.uint8)
    whole = pack(levels.T, bits)
    monkeypatch.setattr("curvepress.quantization.packing.PART", 64)
    assert torch.equal(pack(levels.T, bits), whole)
    assert torch.equal(unpack(whole, bits, (77, 13), signed=False), levels.T)


def test_levels_of_more_bits_are_refused():
    for levels, bits in ((torch.tensor([4], dtype=torch.uint8), 2), (torch.tensor([-3], dtype=torch.int8), 2), (torch.tensor([1]), 8)):
        with pytest.raises(ValueError, match="levels are int8 or uint8 from"):
            pack(levels, bits)
    for wrong in (torch.zeros(2, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8), torch.zeros(3)):
        with pytest.raises(ValueError, match="8 levels of 3 bits take 3 bytes, got"):
            unpack(wrong, 3, (8,), signed=False)


LEVELS, PLACES = ((True, False), (True, True), (False, False)), ((None, None), (0, None), (1, 5))
SCHEMES = [Scheme(b, s, axis, group, n) for b in range(2, 9) for s, n in LEVELS for axis, group in PLACES]


def example(generator: torch.Generator) -> Packed:
    weights = {f"layer{k}.weight": torch.randn(k % 4 + 1, 3, 2 + k, generator=generator) for k in range(len(SCHEMES))}
    grids = {name: fit_grid(w, s, method="minmax") for (name, w), s in zip(weights.items(), SCHEMES, strict=True)}
    tensors = {
        "layer0.bias": torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32),
        "norm.weight": torch.tensor([math.pi, math.nan, -math.inf]),
        "half": torch.randn(2, 3, generator=generator).bfloat16().T,
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "nothing": torch.empty(0, 4),
    }
    activations = {"input": grid(Scheme(8, False), 0.1, 255), "relu": grid(Scheme(4, False), 0.2, 3), "logits": grid(Scheme(8), 0.3)}
    return Packed(tensors, {n: (quantize(w, grids[n]), grids[n]) for n, w in weights.items()}, activations, {"bits": [3, {"a": "ü"}]})


def same_grid(one: Grid, other: Grid) -> bool:
    return one.scheme == other.scheme and torch.equal(one.scale, other.scale) and torch.equal(one.zero_point, other.zero_point)


def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path: Path, generator: torch.Generator):
    packed = example(generator)
    save_packed(packed, tmp_path / "a.safetensors")
    back = load_packed(tmp_path / "a.safetensors")
    assert list(back.tensors) == list(packed.tensors) and list(back.quantized) == list(packed.quantized) and back.plan == packed.plan
    for name, tensor in packed.tensors.items():
        found = back.tensors[name]
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert found.flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist()
    for name, (levels, g) in packed.quantized.items():
        assert back.quantized[name][0].dtype == levels.dtype and torch.equal(back.quantized[name][0], levels)
        assert same_grid(back.quantized[name][1], g)
    assert all(same_grid(back.activations[name], g) for name, g in packed.activations.items())


def test_the_payload_is_exactly_the_bits_of_the_levels(tmp_path: Path, generator: torch.Generator):
    packed = example(generator)
    save_packed(packed, tmp_path / "a.safetensors")
    entries = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert len(entries["levels"]) == sum(math.ceil(q.numel() * g.bits / 8) for q, g in packed.quantized.values())
    save_packed(packed, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_little_but_levels_and_numbers_is_in_the_file(tmp_path: Path, generator: torch.Generator):
    """Names and shapes as in a ResNet-20 for CIFAR-10 at 3 bits."""
    widths = [(16, 3)] + [(16, 16)] * 6 + [(32, 16)] + [(32, 32)] * 5 + [(64, 32)] + [(64, 64)] * 5
    names = ["conv1", *(f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in range(3) for c in (1, 2))]
    weights = {f"{n}.weight": torch.randn(*w, 3, 3, generator=generator) for n, w in zip(names, widths, strict=True)}
    quantized = {n: (quantize(w, g), g) for n, w in weights.items() for g in [fit_grid(w, Scheme(3, axis=0), method="minmax")]}
    biases = {n.replace("weight", "bias"): torch.zeros(len(w), dtype=torch.int32) for n, w in weights.items()}
    activations = {f"{n.removesuffix('.weight')}.output": grid(Scheme(8, False), 0.1, 3) for n in weights}
    plan = {"weights": {n: {"bits": 3, "axis": 0} for n in weights}, "activations": {n: {"bits": 8} for n in activations}}
    save_packed(Packed(biases, quantized, activations, plan), tmp_path / "a.safetensors")
    size = (tmp_path / "a.safetensors").stat().st_size
    numbers = sum(math.ceil(w.numel() * 3 / 8) + 8 * len(w) for w in weights.values()) + 5 * len(activations)
    assert 0 < size - numbers < 0.02 * size


def test_files_that_are_not_what_was_written_are_refused(tmp_path: Path, generator: torch.Generator):
    path = tmp_path / "a.safetensors"
    save_packed(example(generator), path)
    content = path.read_bytes()
    for length in [0, 7, 8, 100, *range(200, len(content), 1999), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="damaged|altered|format"):
            load_packed(path)
    for place in torch.randint(0, len(content), (150,), generator=generator).tolist() + list(range(0, 700, 9)):
        for bit in (place % 8, (place + 3) % 8):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            with pytest.raises(ValueError, match="damaged|altered|format"):
                load_packed(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        load_packed(path)
    path.write_bytes(content)
    load_packed(path)


def test_every_entry_is_under_the_digest(tmp_path: Path, generator: torch.Generator):
    path = tmp_path / "a.safetensors"
    save_packed(example(generator), path)
    entries = safetensors.torch.load_file(path)
    for name, tensor in entries.items():
        changed = tensor.clone()
        changed.view(torch.uint8)[0] ^= 1
        kind = torch.int8 if tensor.element_size() == 1 else torch.int16
        others = [
            {**entries, name: changed},
            {**entries, name: tensor.view(kind)},
            {**entries, name: tensor[None]},
            {**entries, "x": changed},
        ]
        for other in [*others, {k: v for k, v in entries.items() if k != name}]:
            safetensors.torch.save_file(other, path, {"format": "curvepress packed 1"})
            with pytest.raises(ValueError, match="altered"):
                load_packed(path)


def test_other_files_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="is missing"):
        load_packed(tmp_path / "no.safetensors")
    safetensors.torch.save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors", {"format": "curvepress model"})
    with pytest.raises(ValueError, match="its format is 'curvepress model'"):
        load_packed(tmp_path / "other.safetensors")


def test_an_index_that_lies_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, x = tmp_path / "a.safetensors", torch.randn(4, 6)
    g = fit_grid(x, Scheme(4, False, axis=0))
    packed = Packed({"b": torch.zeros(4)}, {"w": (quantize(x, g), g)}, {}, {})
    index = {"quantized": [["w", [4, 6, 4], [4, False, 0, None, False]]], "activations": [], "tensors": [["b", "float32", [4]]], "plan": {}}
    for change in (
        {},
        {"quantized": [["w", [4, 7, 4], [4, False, 0, None, False]]]},
        {"quantized": [["w", [4, 5, 4], [4, False, 0, None, False]]]},
        {"quantized": [["w", [4, 6, 4], [9, False, 0, None, False]]]},
        {"quantized": [["w", [4, 6, 4], ["4", False, 0, None, False]]]},
        {"quantized": [["w", [-4, -6, 4], [4, False, 0, None, False]]]},
        {"quantized": [["w", [2, 12, 4], [4, False, 0, None, False]]]},
        {"quantized": [["w", 3]]},
        {"quantized": 7},
        {"tensors": []},
        {"tensors": [["b", "float64", [4]]]},
        {"tensors": [["b", "float32", [-4]]]},
        {"tensors": [["b", "index", [4]]]},
        {"plan": None},
        {"plan": 3},
    ):
        monkeypatch.setattr("curvepress.quantization.packing._index", lambda _, lie=change: json.dumps({**index, **lie}).encode())
        save_packed(packed, path)
        if change:
            with pytest.raises(ValueError, match="damaged"):
                load_packed(path)
        else:
            assert torch.equal(dequantize(*load_packed(path).quantized["w"]), fake_quantize(x, g))


def test_what_cannot_be_packed_is_refused(tmp_path: Path):
    g = grid(Scheme(3, narrow=True), 1.0)
    path = tmp_path / "a.safetensors"
    for levels in (torch.tensor([-4], dtype=torch.int8), torch.tensor([1], dtype=torch.uint8), torch.tensor([1])):
        with pytest.raises(ValueError, match="conv.weight has .* levels, its grid"):
            save_packed(Packed({}, {"conv.weight": (levels, g)}, {}, {}), path)
    with pytest.raises(ValueError, match="JSON"):
        save_packed(Packed({}, {}, {}, {"price": math.nan}), path)
    with pytest.raises((ValueError, TypeError)):
        save_packed(Packed({}, {}, {}, {"price": torch.zeros(1)}), path)
    assert not path.exists()


def test_an_empty_file_comes_back_empty(tmp_path: Path):
    save_packed(Packed({}, {}, {}, {"a": 1}), tmp_path / "a.safetensors")
    back = load_packed(tmp_path / "a.safetensors")
    assert (back.tensors, back.quantized, back.activations, back.plan) == ({}, {}, {}, {"a": 1})
