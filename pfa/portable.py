# SPDX-License-Identifier: Apache-2.0
"""Which calls also run on the seed API's own hardware."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

_UNLIMITED = 2147483647
_ALIGNMENT_BYTES = 32


@dataclass(frozen=True)
class _Product:
    dtypes: tuple[torch.dtype, ...]
    batch: int
    seqlen: int
    only_defaults: bool


_HALVES_AND_INT8 = (torch.float16, torch.bfloat16, torch.int8)
_PRODUCTS = {
    "atlas_a2": _Product(_HALVES_AND_INT8, 65536, 20971520, only_defaults=False),
    "atlas_a3": _Product(_HALVES_AND_INT8, 65536, 20971520, only_defaults=False),
    "atlas_inference": _Product((torch.float16,), 128, 65535, only_defaults=True),
}
_HEADS, _HEAD_DIM, _WIDTH, _UNALIGNED_BATCH = 256, 512, 65535, 128


def check_portable(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    product: str,
    pse_shift: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    actual_seq_lengths: Sequence[int] | torch.Tensor | None = None,
    deq_scale1: torch.Tensor | None = None,
    quant_scale1: torch.Tensor | None = None,
    deq_scale2: torch.Tensor | None = None,
    quant_scale2: torch.Tensor | None = None,
    quant_offset2: torch.Tensor | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    pre_tokens: int = _UNLIMITED,
    next_tokens: int = 0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    actual_seq_lengths_kv: Sequence[int] | torch.Tensor | None = None,
    sparse_mode: int = 0,
) -> list[str]:
    """Name the documented limits of ``product`` that a call breaks; an empty list means none.

    Only what goes beyond ``pfa.prompt_flash_attention``'s own rules is judged: a call that is
    wrong here as well should be tried here first. Nothing is computed and no content is read.

    Parameters
    ----------
    query, key, value, ... :
        The arguments of ``pfa.prompt_flash_attention``.
    product : {"atlas_a2", "atlas_a3", "atlas_inference"}
        The Atlas A2 and A3 series (training and inference) and the Atlas inference accelerator
        cards.

    Returns
    -------
    list of str
        One sentence per broken limit, in the wording of the operator's errors.

    Raises
    ------
    ValueError
        If ``product`` or ``input_layout`` is unknown, or a tensor's rank does not fit the layout.

    Notes
    -----
    Source: the public document of ``torch_npu.npu_prompt_flash_attention`` (Ascend/op-plugin,
    docs/context), read in 2026. It contradicts itself on a head dimension that is not a multiple
    of 32 bytes: one place limits the batch size to 128 then, another calls it unsupported; both
    are reported. It asks for N * D "less than 65535" in the layouts BSH and BSND. Nothing here was
    run on that hardware, and undocumented limits, such as time-outs of very long sequences, are
    not known.

    Examples
    --------
    >>> import torch, pfa
    >>> x = torch.zeros(1, 16, 2 * 64, dtype=torch.bfloat16)
    >>> pfa.check_portable(x, x, x, num_heads=2, product="atlas_a2")
    []
    >>> pfa.check_portable(x, x, x, num_heads=2, product="atlas_inference")
    ['query must have dtype float16, got bfloat16']
    """
    limits = _PRODUCTS.get(product)
    if limits is None:
        raise ValueError(f"product must be one of {', '.join(_PRODUCTS)}, got {product}")
    tensors = {"query": query, "key": key, "value": value}
    sizes = _sizes(tensors, input_layout, num_heads, num_key_value_heads)
    optional = {
        "pse_shift": pse_shift,
        "atten_mask": atten_mask,
        "deq_scale1": deq_scale1,
        "quant_scale1": quant_scale1,
        "deq_scale2": deq_scale2,
        "quant_scale2": quant_scale2,
        "quant_offset2": quant_offset2,
    }
    broken = [*_dtypes(tensors, limits), *_axes(sizes, query, input_layout, limits)]
    broken += _contiguity({**tensors, **optional})
    broken += _lists(actual_seq_lengths, actual_seq_lengths_kv)
    broken += _channels(quant_scale2, sizes, query)
    if limits.only_defaults:
        only_none: dict[str, object] = {**optional, "atten_mask": None}
        only_none["actual_seq_lengths"] = actual_seq_lengths
        only_none["actual_seq_lengths_kv"] = actual_seq_lengths_kv
        broken += [f"{name} must be None" for name, x in only_none.items() if x is not None]
        broken += _defaults(pre_tokens, next_tokens, num_key_value_heads, sparse_mode)
    return broken


@dataclass(frozen=True)
class _Sizes:
    batch: int
    heads: int
    seqlens: tuple[int, int]
    head_dim: int


def _sizes(
    tensors: dict[str, torch.Tensor], layout: str, num_heads: int, num_key_value_heads: int
) -> _Sizes:
    if layout not in ("BSH", "BSND", "BNSD", "BNSD_BSND"):
        raise ValueError(f"input_layout must be BSH, BSND, BNSD or BNSD_BSND, got {layout}")
    rank = 3 if layout == "BSH" else 4
    for name, x in tensors.items():
        if x.dim() != rank:
            raise ValueError(f"{name} must have {rank} dimensions, got shape {tuple(x.shape)}")
    query, key = tensors["query"], tensors["key"]
    axis = 2 if layout.startswith("BNSD") else 1
    head_dim = query.shape[2] // max(num_heads, 1) if layout == "BSH" else query.shape[3]
    heads = max(num_heads, num_key_value_heads)
    return _Sizes(query.shape[0], heads, (query.shape[axis], key.shape[axis]), head_dim)


def _dtypes(tensors: dict[str, torch.Tensor], limits: _Product) -> Iterator[str]:
    names = ", ".join(_name(dtype) for dtype in limits.dtypes)
    query = tensors["query"]
    if query.dtype not in limits.dtypes:
        yield f"query must have dtype {names}, got {_name(query.dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _axes(sizes: _Sizes, query: torch.Tensor, layout: str, limits: _Product) -> Iterator[str]:
    if sizes.batch > limits.batch:
        yield f"the batch size must be at most {limits.batch}, got {sizes.batch}"
    if sizes.heads > _HEADS:
        yield f"num_heads must be at most {_HEADS}, got {sizes.heads}"
    longest = max(sizes.seqlens)
    if longest > limits.seqlen:
        yield f"sequence lengths must be at most {limits.seqlen}, got {longest}"
    if sizes.head_dim > _HEAD_DIM:
        yield f"the head dimension must be at most {_HEAD_DIM}, got {sizes.head_dim}"
    step = _ALIGNMENT_BYTES // query.element_size()
    if sizes.head_dim % step:
        yield f"the head dimension must be a multiple of {step}, got {sizes.head_dim}"
        if _UNALIGNED_BATCH < sizes.batch <= limits.batch:
            yield (
                f"the batch size must be at most {_UNALIGNED_BATCH} when the head dimension is "
                f"not a multiple of {step}, got {sizes.batch}"
            )
    width = sizes.heads * sizes.head_dim
    if layout in ("BSH", "BSND") and width >= _WIDTH and not limits.only_defaults:
        yield f"num_heads * head_dim must be less than {_WIDTH} in {layout}, got {width}"


def _contiguity(tensors: dict[str, torch.Tensor | None]) -> Iterator[str]:
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            yield f"{name} must be contiguous"


def _lists(*lengths: Sequence[int] | torch.Tensor | None) -> Iterator[str]:
    for name, x in zip(("actual_seq_lengths", "actual_seq_lengths_kv"), lengths, strict=True):
        if isinstance(x, torch.Tensor):
            yield f"{name} must be a list of int, got a tensor"


def _channels(scale: torch.Tensor | None, sizes: _Sizes, query: torch.Tensor) -> Iterator[str]:
    step = _ALIGNMENT_BYTES // query.element_size()
    if scale is not None and scale.numel() > 1 and sizes.head_dim % step:
        yield (
            "quant_scale2 must have one element when the head dimension is not a multiple of "
            f"{step}, got {scale.numel()}"
        )


def _defaults(
    pre_tokens: int, next_tokens: int, num_key_value_heads: int, sparse_mode: int
) -> Iterator[str]:
    if pre_tokens != _UNLIMITED:
        yield f"pre_tokens must be {_UNLIMITED}, got {pre_tokens}"
    if next_tokens not in (0, _UNLIMITED):
        yield f"next_tokens must be 0 or {_UNLIMITED}, got {next_tokens}"
    if num_key_value_heads != 0:
        yield f"num_key_value_heads must be 0, got {num_key_value_heads}"
    if sparse_mode != 0:
        yield f"sparse_mode must be 0, got {sparse_mode}"
