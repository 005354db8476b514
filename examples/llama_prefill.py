# SPDX-License-Identifier: Apache-2.0
"""A Llama-style decoder layer that calls the operator itself: rotary positions, grouped heads,
prompts of different lengths in one batch. Compared with SDPA in float32, and timed beside it.

The lengths go to the operator as they are: no mask is built, and padding costs nothing. A second
step continues the prompts from the first step's keys and values (sparse_mode=3).
"""

import argparse
import statistics
import time

import torch
from torch.nn import functional

import pfa

WIDTH, HEADS, HEADS_K, DIM = 256, 4, 2, 64


class Layer(torch.nn.Module):
    """Attention and a gated MLP, each after an RMS norm."""

    def __init__(self, attend) -> None:
        super().__init__()
        self.attend, self.times = attend, []
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(WIDTH) for _ in range(2))
        self.qkv = torch.nn.Linear(WIDTH, (HEADS + 2 * HEADS_K) * DIM, bias=False)
        self.out = torch.nn.Linear(HEADS * DIM, WIDTH, bias=False)
        self.gate_up = torch.nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = torch.nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x, lengths, cache=None):
        """x (B, S, WIDTH); lengths of each prompt, in all and of these rows; cache (k, v)."""
        total, rows = lengths
        first = 0 if cache is None else cache[0].shape[1]
        q, k, v = (
            part.unflatten(-1, (-1, DIM))
            for part in self.qkv(self.norms[0](x)).split(
                [HEADS * DIM, HEADS_K * DIM, HEADS_K * DIM], -1
            )
        )
        q, k = rotate(q, first), rotate(k, first)
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=1), torch.cat([cache[1], v], dim=1)
        start = time.perf_counter()
        attended = self.attend(q, k, v, rows, total)
        self.times.append(1e3 * (time.perf_counter() - start))
        x = x + self.out(attended.flatten(2))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up), (k, v)


def rotate(x, first):
    """Rotary positions of (B, S, N, DIM)."""
    half = DIM // 2
    frequency = 1e4 ** -(torch.arange(half) / half)
    angle = (torch.arange(x.shape[1]) + first)[:, None, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.split(half, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend_pfa(q, k, v, rows, total):
    return pfa.prompt_flash_attention(
        q,
        k,
        v,
        input_layout="BSND",
        num_heads=HEADS,
        num_key_value_heads=HEADS_K,
        scale_value=DIM**-0.5,
        sparse_mode=3,  # causal, aligned where the valid rows and keys end
        actual_seq_lengths=rows,
        actual_seq_lengths_kv=total,
    )


def attend_sdpa(q, k, v, rows, total):
    """The same with a mask, as SDPA wants it: True = keep."""
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    rows, total = (torch.tensor(x).view(-1, 1, 1, 1) for x in (rows, total))
    keep = (j <= i + total - rows) & (j < total) & (i < rows)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)
    return out.transpose(1, 2)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=256, help="of the longest prompt (256)")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes (3)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    rows = arguments.rows
    prompts = [rows, rows // 3, rows // 2, rows // 5]
    layers = {name: Layer(f) for name, f in (("pfa", attend_pfa), ("SDPA", attend_sdpa))}
    layers["SDPA"].load_state_dict(layers["pfa"].state_dict())
    exact = Layer(attend_sdpa)
    exact.load_state_dict(layers["pfa"].bfloat16().state_dict())
    layers["SDPA"].bfloat16()
    x = torch.randn(len(prompts), rows, WIDTH).bfloat16()
    more = torch.randn(len(prompts), 16, WIDTH).bfloat16()  # 16 more tokens of the longest prompt
    valid = torch.arange(rows) < torch.tensor(prompts)[:, None]

    with torch.inference_mode():
        want, cache = exact(x.float(), (prompts, prompts))
        longer = ([rows + 16], [16])
        want_more, _ = exact(more[:1].float(), longer, [c[:1] for c in cache])
        for name, layer in layers.items():
            got, cache = layer(x, (prompts, prompts))
            got_more, _ = layer(more[:1], longer, [c[:1] for c in cache])
            layer.times.clear()
            for _ in range(arguments.repeats):
                layer(x, (prompts, prompts))
            errors = (
                (got.float() - want)[valid].abs().max(),
                (got_more.float() - want_more).abs().max(),
            )
            print(
                f"{name:5} prompts {prompts}: attention {statistics.median(layer.times):6.1f} ms, "
                f"error to float32 {errors[0]:.3f}, continued {errors[1]:.3f}"
            )
            if max(errors) > 0.05:
                raise SystemExit(f"the error must be at most 0.05, got {max(errors)}")


if __name__ == "__main__":
    main()
