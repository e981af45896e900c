"""Tiny Hugging Face models with random weights: configurations only, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

TEXT = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
PATCHES = {
    "image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "num_labels": 5,
}  # fmt: skip
ALIKE = {"vocab_size": 61, "max_position_embeddings": 64, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Inputs:
    """What the forward pass takes, made from a number of examples and a seed."""

    kind: str

    def __call__(self, count: int = 3, seed: int = 0, length: int = 7) -> tuple[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 61, (count, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - 2 :] = 0  # a shorter first example
        images = torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64)
        sound = torch.randn(count, 8, 32, generator=generator, dtype=torch.float64)
        every = {
            "text": {"input_ids": ids, "attention_mask": mask},
            "pair": {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :5]},
            "image and text": {"input_ids": ids, "pixel_values": images},
            "image": {"pixel_values": images},
            "sound": {"input_features": sound},
        }
        return (every[self.kind],)


@dataclass(frozen=True)
class HFCase:
    """A Hugging Face model in float64 and evaluation mode, and inputs for it."""

    name: str
    model: nn.Module
    inputs: Inputs

    @property
    def example(self) -> tuple[dict[str, Tensor]]:
        return self.inputs()


class Logits(nn.Module):
    """Of an encoder-decoder the logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids).logits


class Similarity(nn.Module):
    """CLIP's scores of texts against images alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, pixel_values=pixel_values).logits_per_text


def _llama(kind: str = "Llama", kv: int = 2, **more: Any) -> nn.Module:
    settings = {**TEXT, **ALIKE, "num_key_value_heads": kv, **more}
    return getattr(hf, f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**settings))


def _bert(kind: str = "Bert", **more: Any) -> nn.Module:
    settings = {**TEXT, "max_position_embeddings": 64, "num_labels": 5, "pad_token_id": 0, **more}
    return getattr(hf, f"{kind}ForSequenceClassification")(getattr(hf, f"{kind}Config")(**settings))


def _distilbert() -> nn.Module:
    sizes = {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}
    return hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**sizes, num_labels=5, pad_token_id=0))


def _gpt2() -> nn.Module:
    sizes = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, use_cache=False, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def _t5(**more: Any) -> nn.Module:
    sizes = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    more = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "use_cache": False, **more}
    return Logits(hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **more)))


def _swin() -> nn.Module:
    return hf.SwinForImageClassification(
        hf.SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5)
    )


def _convnext(kind: str) -> nn.Module:
    sizes = {"hidden_sizes": [16, 32], "depths": [2, 1], "num_stages": 2, "patch_size": 2, "num_labels": 5, "layer_scale_init_value": 0.5}
    return getattr(hf, f"{kind}ForImageClassification")(getattr(hf, f"{kind}Config")(**sizes))


def _yolos() -> nn.Module:
    more = {"image_size": [16, 16], "num_detection_tokens": 4, "use_mid_position_embeddings": True}
    return hf.YolosForObjectDetection(hf.YolosConfig(**{**PATCHES, **more}))


def _clip() -> nn.Module:
    text = {**TEXT, "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    vision = {k: v for k, v in PATCHES.items() if k != "num_labels"}
    return Similarity(hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)))


def _whisper() -> nn.Module:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    return WhisperEncoder(hf.WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=16))


def _eager(model: nn.Module) -> nn.Module:
    model.set_attn_implementation("eager")
    return model


HF_ZOO: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "BERT": (_bert, "text"),
    "BERT, eager attention": (lambda: _eager(_bert()), "text"),
    "DistilBERT": (_distilbert, "text"),
    "RoBERTa": (lambda: _bert("Roberta"), "text"),
    "MiniLM": (lambda: _bert(hidden_size=24, num_attention_heads=6, intermediate_size=96), "text"),
    "GPT-2": (_gpt2, "text"),
    "Llama": (lambda: _llama(kv=4), "text"),
    "Llama, grouped-query": (_llama, "text"),
    "Llama, multi-query": (lambda: _llama(kv=1), "text"),
    "Llama, grouped-query, eager": (lambda: _eager(_llama()), "text"),
    "Mistral": (lambda: _llama("Mistral"), "text"),
    "Qwen2": (lambda: _llama("Qwen2"), "text"),
    "Qwen2, tied": (lambda: _llama("Qwen2", tie_word_embeddings=True), "text"),
    "Gemma": (lambda: _llama("Gemma", head_dim=12), "text"),
    "Mixtral": (lambda: _llama("Mixtral", num_local_experts=4, experts_implementation="eager"), "text"),
    "T5": (_t5, "pair"),
    "T5, gated": (lambda: _t5(feed_forward_proj="gated-gelu"), "pair"),
    "ViT": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**PATCHES)), "image"),
    "DeiT": (lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**PATCHES)), "image"),
    "Swin": (_swin, "image"),
    "ConvNeXt": (lambda: _convnext("ConvNext"), "image"),
    "ConvNeXt V2": (lambda: _convnext("ConvNextV2"), "image"),
    "YOLOS": (_yolos, "image"),
    "CLIP": (_clip, "image and text"),
    "Whisper encoder": (_whisper, "sound"),
}


def make_hf(name: str, seed: int = 0) -> HFCase:
    """The named model with random weights, in float64 and evaluation mode; norms and biases are not at their initial values."""
    torch.manual_seed(seed)
    build, inputs = HF_ZOO[name]
    model = build().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return HFCase(name, model, Inputs(inputs))
