# SPDX-License-Identifier: Apache-2.0
"""The 64-bit coding of dequantisation scales that the seed API uses."""

import torch

_MANTISSA_10_BITS = 0xFFFFE000  # sign, exponent and the upper 10 bits of the mantissa
_SCALE_MODE = 1 << 46
_OFFSET_SHIFT, _OFFSET_BITS = 37, 0x1FF


def trans_quant_param(scale: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
    """Code float32 scales as 64-bit words, as ``torch_npu.npu_trans_quant_param`` does.

    ``deq_scale1`` and ``deq_scale2`` accept these words as well as plain float32 tensors. Plain
    float32 is better: the coding keeps 10 of 23 mantissa bits, a relative error below 2**-10.

    Parameters
    ----------
    scale : Tensor of float32, any shape
        Dequantisation scales, real value per integer step.
    offset : Tensor of float32, the shape of ``scale`` or one element, optional
        Rounded to integers of 9 bits (-256 to 255) and stored in bits 37 to 45. The operator
        ignores it, as it ignores every bit above the lower 32.

    Returns
    -------
    Tensor of int64, the shape of ``scale``
        Bits 0 to 31 hold the scale's own bits with the lower 13 cleared, bit 46 is set.

    Raises
    ------
    TypeError
        If ``scale`` or ``offset`` is not float32.
    ValueError
        If ``offset`` does not fit ``scale``, or a value of it does not fit 9 bits.

    Examples
    --------
    >>> import torch, pfa
    >>> hex(pfa.trans_quant_param(torch.tensor([0.5])).item())
    '0x40003f000000'
    """
    _check_float32("scale", scale)
    words = scale.contiguous().view(torch.int32).to(torch.int64) & _MANTISSA_10_BITS
    words |= _SCALE_MODE
    if offset is None:
        return words
    _check_float32("offset", offset)
    if offset.numel() != 1 and offset.shape != scale.shape:
        raise ValueError(
            f"offset must have one element or the shape of scale {tuple(scale.shape)}, "
            f"got {tuple(offset.shape)}"
        )
    steps = offset.round()
    if bool(((steps < -256) | (steps > 255) | steps.isnan()).any()):
        raise ValueError("offset must lie between -256 and 255")
    steps = steps.to(torch.int64)
    if offset.numel() == 1:
        steps = steps.reshape(())
    return words | ((steps & _OFFSET_BITS) << _OFFSET_SHIFT)


def _check_float32(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name} must have dtype float32, got {tensor.dtype}")
