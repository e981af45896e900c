"""Transformers and the networks beside them, tiny and with random weights: quantized, exported, run, and compared."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs the package transformers")

import transformers as hf
from hf_zoo import PATCHES, TEXT, Inputs

from curvepress.export.integers import IntegerAgreement, to_integer_onnx
from curvepress.objective import outputs
from curvepress.quantization.quantized import Bits, calibrate, layout, quantize

EXPORTED = r"ignore:.*`isinstance\(treespec, LeafSpec\)` is deprecated.*:FutureWarning"
pytestmark = pytest.mark.filterwarnings(EXPORTED)
ENCODER = {**TEXT, "num_hidden_layers": 1, "max_position_embeddings": 64, "num_labels": 5, "pad_token_id": 0}
DECODER = {"vocab_size": 61, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DISTILLED = {"vocab_size": 61, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}
MODELS = {
    "BERT": lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER)),
    "DistilBERT": lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**DISTILLED, num_labels=5, pad_token_id=0)),
    "RoBERTa": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER)),
    "MiniLM": lambda: hf.BertModel(hf.BertConfig(**{**ENCODER, "hidden_size": 24, "num_attention_heads": 6, "intermediate_size": 96})),
    "GPT-2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**DECODER, n_embd=32, n_layer=1, n_head=4, n_inner=48, n_positions=64)),
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**TEXT, **DECODER, "num_hidden_layers": 1, "num_key_value_heads": 2})),
    "ViT": lambda: hf.ViTForImageClassification(hf.ViTConfig(**{**PATCHES, "num_hidden_layers": 1})),
    "DeiT": lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**{**PATCHES, "num_hidden_layers": 1})),
    "Swin": lambda: hf.SwinForImageClassification(
        hf.SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4, num_labels=5)
    ),
    "ConvNeXt": lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, patch_size=2, num_labels=5, layer_scale_init_value=0.5)
    ),
    "ResNet": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    ),
    "MobileNetV2": lambda: hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(image_size=16, depth_multiplier=0.25, num_labels=5)),
}
TEXTS = {"BERT", "DistilBERT", "RoBERTa", "MiniLM", "GPT-2", "Llama"}


def case(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in float32 and 16 examples as keyword inputs; the first sentence is padded."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    given = Inputs("text" if name in TEXTS else "image")(count=16)[0]
    return model, {n: x.float() if x.is_floating_point() else x for n, x in given.items()}


def exported(name: str, bits: Bits, path: Path) -> tuple[nn.Module, IntegerAgreement, float]:
    """The quantized module, how its file agrees with it, and how far its outputs are from those of the model, relatively."""
    model, inputs = case(name)
    module = calibrate(quantize(model, bits, inputs), [(inputs, None)]).eval()
    found = to_integer_onnx(module, [(inputs, None)], path, least_same=90)  # of random weights some logits are nearly equal
    with torch.no_grad():
        wanted, got = (outputs(m(**inputs))[0] for m in (model, module))
    return module, found, float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", MODELS)
def test_every_product_runs_on_integers_and_the_file_computes_what_the_simulation_does(name: str, tmp_path: Path):
    module, found, apart = exported(name, Bits(), tmp_path / "a.onnx")
    assert found.same == 100 and found.mean < 1e-3 and 0 < apart < 0.1
    assert found.kernels.integer == found.kernels.total and not found.kernels.float
    counted = [p for p in layout(module).products if p.operator != "embedding"]
    assert sum(found.kernels.total.values()) == len(counted) and not layout(module).unread


def test_four_bits_for_groups_of_inputs_are_stored_as_int4_and_multiplied_as_they_are(tmp_path: Path):
    module, found, apart = exported("Llama", Bits(weight=4, group=16, product=None, sum=None), tmp_path / "a.onnx")
    assert found.same == 100 and found.mean < 0.01 and apart < 0.3
    linear = [p for p in layout(module).products if p.weight and p.operator != "embedding"]
    assert found.kernels.integer["linear layers"] == found.kernels.total["linear layers"] == len(linear)
    kinds = {i.name: i.data_type for i in onnx.load(tmp_path / "a.onnx").graph.initializer if i.name.endswith("weight_levels")}
    assert [n for n, kind in kinds.items() if kind != onnx.TensorProto.INT4] == ["model.embed_tokens.weight_levels"]


def test_tokens_with_grids_of_their_own_are_exported_and_named_as_float(tmp_path: Path):
    _, found, apart = exported("GPT-2", Bits(dynamic=True), tmp_path / "a.onnx")
    assert found.same > 95 and found.mean < 0.01 and apart < 0.1
    assert found.kernels.integer["matrix products"] == found.kernels.total["matrix products"]
    assert len(found.kernels.float) == 4 and {r.partition(",")[0] for r in found.kernels.float.values()} == {
        "its input has a grid for each token"
    }
