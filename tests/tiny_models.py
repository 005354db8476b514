# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of transformers, and the inputs to run them on; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCABULARY = 97
LAYERS = 2
LENGTHS = (23, 9, 16)  # of the three sequences of a padded batch
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.1,  # large enough for attention to be far from uniform
}
CAUSAL = COMMON | {"bos_token_id": 1, "eos_token_id": None, "num_key_value_heads": 2}
IMAGE = {"image_size": 32, "patch_size": 8}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": LAYERS, "num_heads": 4}


def vit_config() -> Any:
    return transformers.ViTConfig(**COMMON, **IMAGE)


def gpt_oss_config() -> Any:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return transformers.GptOssConfig(
        **CAUSAL, **experts, head_dim=32, sliding_window=8, rope_parameters=rope
    )


def gemma2_config() -> Any:
    return transformers.Gemma2Config(
        **CAUSAL, head_dim=32, sliding_window=8, attn_logit_softcapping=2.0
    )


_MAKE: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**COMMON)),
    "vit": lambda: transformers.ViTModel(vit_config()),
    "t5": lambda: transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=VOCABULARY, pad_token_id=0, **T5)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**CAUSAL)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **CAUSAL, use_sliding_window=True, sliding_window=8, max_window_layers=1
        )
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**CAUSAL, head_dim=48)),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**CAUSAL, sliding_window=8)
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(gemma2_config()),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(gpt_oss_config()),
}
DECODERS = ("llama", "qwen2", "qwen3", "mistral")
SERVED = (*DECODERS, "bert", "vit", "t5")
WITHOUT_SDPA = ("gemma2", "gpt_oss")  # a soft cap of the scores; attention sinks


def make_model(name: str, dtype: torch.dtype, implementation: str = "eager") -> Any:
    torch.manual_seed(7)
    model = _MAKE[name]().to(dtype).eval()
    model.set_attn_implementation(implementation)
    return model


def make_batch(padding: str) -> dict[str, torch.Tensor]:
    """Token ids and mask; padding is none, left or right."""
    generator = torch.Generator().manual_seed(11)
    longest = max(LENGTHS)
    ids = torch.randint(2, VOCABULARY, (len(LENGTHS), longest), generator=generator)
    keep = torch.ones_like(ids)
    for row, length in enumerate(LENGTHS):
        if padding == "left":
            keep[row, : longest - length] = 0
        elif padding == "right":
            keep[row, length:] = 0
    return {"input_ids": ids.masked_fill(keep == 0, 0), "attention_mask": keep}


def make_inputs(name: str, padding: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if name != "vit":
        return make_batch(padding)
    generator = torch.Generator().manual_seed(11)
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    return {"pixel_values": pixels.to(dtype)}
