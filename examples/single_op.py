# SPDX-License-Identifier: Apache-2.0
"""One call of the operator on the CPU or a GPU, checked against attention in float64."""

import argparse

import torch

import pfa


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"({device})")
    return parser.parse_args()


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor, scale: float
) -> torch.Tensor:
    """(B, S_q, N, D) in float64, with the keys' heads repeated for their group of query heads."""
    q, k, v = (x.double().cpu().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~keep, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def main() -> None:
    device = parse_arguments().device
    torch.manual_seed(0)
    batch, rows, heads, heads_k, dim = 2, 300, 8, 2, 64
    q = torch.randn(batch, rows, heads, dim, dtype=torch.float16, device=device)
    k = torch.randn(batch, rows, heads_k, dim, dtype=torch.float16, device=device)
    v = torch.randn(batch, rows, heads_k, dim, dtype=torch.float16, device=device)
    lengths = [300, 170]  # valid keys of each batch element; the rest is never read

    out = pfa.prompt_flash_attention(
        q,
        k,
        v,
        input_layout="BSND",
        num_heads=heads,
        num_key_value_heads=heads_k,
        scale_value=dim**-0.5,  # the default is 1.0
        sparse_mode=2,  # causal
        actual_seq_lengths=lengths,
        actual_seq_lengths_kv=lengths,
    )

    row = torch.arange(rows)
    valid = torch.tensor(lengths).view(-1, 1, 1, 1)
    keep = (row <= row[:, None]) & (row < valid)  # (B, 1, S_q, S_kv), True = seen
    exact = reference(q, k, v, keep, dim**-0.5)
    exact[1, lengths[1] :] = 0  # rows beyond the length
    error = float((out.double().cpu() - exact).abs().max())
    print(f"{tuple(out.shape)} {out.dtype} on {out.device}, largest error {error:.1e}")
    if error > 2e-3:
        raise SystemExit(f"the error must be at most 2e-3, got {error}")


if __name__ == "__main__":
    main()
