# SPDX-License-Identifier: Apache-2.0
"""A vision transformer over images of different sizes packed into one sequence: a block-diagonal
mask keeps each image to itself. Compared with the images one by one, and timed beside SDPA.

The blocks of the mask that are empty are not computed.
"""

import argparse
import statistics
import time

import torch
from torch.nn import functional

import pfa

PATCH, WIDTH, HEADS, LAYERS = 14, 192, 3, 2
SIZES = ((224, 224), (98, 322), (448, 224), (140, 140), (322, 322))  # height and width in pixels


class Stopwatch:
    """An attention function that keeps the milliseconds of each call."""

    def __init__(self, function) -> None:
        self.function, self.times = function, []

    def __call__(self, *args):
        start = time.perf_counter()
        out = self.function(*args)
        self.times.append(1e3 * (time.perf_counter() - start))
        return out


def attend_pfa(q, k, v, drop):
    """drop (S, S), True = masked out, or None"""
    return pfa.prompt_flash_attention(
        q,
        k,
        v,
        input_layout="BSND",
        num_heads=HEADS,
        scale_value=q.shape[-1] ** -0.5,
        atten_mask=drop,
        sparse_mode=0 if drop is None else 1,  # 1: the mask alone
    )


def attend_sdpa(q, k, v, drop):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    keep = None if drop is None else ~drop
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.GELU(), torch.nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x, attend, drop):
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        x = x + self.out(attend(q, k, v, drop).flatten(2))
        return x + self.mlp(self.norms[1](x))


class VisionTransformer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(3 * PATCH * PATCH, WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, patches, attend, drop=None):
        """patches (1, S, 3 * PATCH**2) -> (1, S, WIDTH)"""
        x = self.embed(patches)
        for block in self.blocks:
            x = block(x, attend, drop)
        return x


def patches_of(image):
    """(3, H, W) -> (S, 3 * PATCH**2)"""
    tiles = image.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    return tiles.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="timed passes (3)")
    return parser.parse_args()


def main() -> None:
    repeats = parse_arguments().repeats
    torch.manual_seed(0)
    images = [patches_of(torch.randn(3, *size)).bfloat16() for size in SIZES]
    owner = torch.repeat_interleave(torch.tensor([len(x) for x in images]))
    drop = owner[:, None] != owner  # (S, S), True = another image
    packed = torch.cat(images)[None]
    model = VisionTransformer().bfloat16().eval()
    print(
        f"{len(images)} images, {len(owner)} patches, {100 * float((~drop).float().mean()):.0f} % "
        "of the pairs inside a block"
    )
    with torch.inference_mode():
        exact_model = VisionTransformer().eval()
        exact_model.load_state_dict(model.state_dict())
        exact = torch.cat([exact_model(x[None].float(), attend_sdpa)[0] for x in images])
        for name, attend in (("pfa", attend_pfa), ("SDPA", attend_sdpa)):
            watch = Stopwatch(attend)
            out = model(packed, attend, drop)[0]
            for _ in range(repeats):
                model(packed, watch, drop)
            error = float((out.float() - exact).abs().max())
            print(
                f"{name:5} packed: attention {statistics.median(watch.times):6.1f} ms a layer, "
                f"error to one by one in float32 {error:.3f}"
            )
            if error > 0.1:
                raise SystemExit(f"the error must be at most 0.1, got {error}")


if __name__ == "__main__":
    main()
