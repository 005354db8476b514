# SPDX-License-Identifier: Apache-2.0
"""What this installation has and what a call would take: ``python -m pfa.info``.

python -m pfa.info                   versions, kernels inside, why CUDA is off
python -m pfa.info --query 2,4096,32,128 --key 2,4096,8,128 --layout BSND --sparse-mode 3
python -m pfa.info --json ...        the same for programs
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from typing import Any

import torch

from . import _library
from ._version import __version__

__all__ = ["explain", "report"]

_OLDEST_CAPABILITY = (8, 0)


def report() -> dict[str, Any]:
    """Return versions, kernels inside the library, GPUs, and why CUDA is off, as plain data.

    Never raises; a library that could not be loaded leaves its reason under ``library.error``.
    """
    error = _library.load_error
    contents = None if error else _library.contents()
    gpus = range(torch.cuda.device_count())
    return {
        "pfa": __version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "library": {"path": str(_library.path), "error": error},
        "cpu": {
            "isa": None if error else _isa(),
            "isas": contents.cpu_isas if contents else {},
            "threads": torch.get_num_threads(),
        },
        "cuda": {
            "off": why_cuda_is_off(),
            "architectures": contents.architectures if contents else [],
            "kernels": contents.cuda_kernels if contents else [],
            "gpus": [
                {
                    "name": torch.cuda.get_device_name(i),
                    "capability": "{}.{}".format(*torch.cuda.get_device_capability(i)),
                }
                for i in gpus
            ],
        },
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("PFA_")},
    }


def _isa() -> str:
    try:
        return _library.cpu_isa()
    except RuntimeError as error:  # PFA_CPU_ISA names none
        return str(error)


def why_cuda_is_off() -> str | None:
    """Return why calls with CUDA tensors cannot be served here, None if they can."""
    if _library.load_error is not None:
        return f"the library is not loaded: {_library.load_error}"
    if not _library.contents().architectures:
        return "the library was built without CUDA kernels: no nvcc was found, or not asked for"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    count = torch.cuda.device_count()
    if all(torch.cuda.get_device_capability(i) < _OLDEST_CAPABILITY for i in range(count)):
        return "no GPU has compute capability 8.0 or higher"
    if os.environ.get("PFA_FORCE_BACKEND") == "cpu":
        return "PFA_FORCE_BACKEND is cpu"
    return None


def explain(*args: Any, **options: Any) -> dict[str, Any]:
    """Return what a call takes, and why it takes nothing else.

    Parameters
    ----------
    *args, **options
        The arguments of ``torch.ops.pfa.forward``. Contents are not read, nothing is computed.

    Returns
    -------
    dict
        ``backend``, ``kernel``, ``block_m`` (query rows of a block), ``block_n`` (keys of a tile),
        ``num_splits``, ``cut_blocks`` and ``cut_tiles`` (of the last blocks alone, and in what
        shares), and ``refused``: the reason for every other choice, best first.

    Raises
    ------
    RuntimeError
        As the call itself would.

    Examples
    --------
    >>> import torch, pfa.info
    >>> x = torch.zeros(1, 16, 64, dtype=torch.bfloat16)
    >>> pfa.info.explain(x, x, x)["backend"]
    'cpu'
    """
    choice = _library.choice(*args, **options)
    taken = choice._asdict()
    why = taken.pop("why_not_sm90")
    query = args[0] if args else options["query"]
    if choice.kernel == "none":
        taken["refused"] = {}
    elif choice.backend == "cpu":
        off = why_cuda_is_off()
        reason = "query is on the CPU" + (f"; CUDA is off: {off}" if off else "")
        taken["refused"] = {"cuda": reason, **_refused_isas(choice.kernel)}
    else:
        taken["refused"] = _refused_families(choice.kernel, why)
        taken["refused"]["cpu"] = (
            "query is on a GPU" if query.is_cuda else "PFA_FORCE_BACKEND is cuda"
        )
    return taken


def _refused_isas(taken: str) -> dict[str, str]:
    refused = {}
    isas = _library.contents().cpu_isas
    forced = os.environ.get("PFA_CPU_ISA")
    best = next(name for name, usable in isas.items() if usable)
    for name, usable in isas.items():
        if not usable:
            refused[name] = "this processor, or its operating system, lacks it"
        elif name != taken:
            refused[name] = f"PFA_CPU_ISA is {forced}" if forced else f"{best} comes first"
    return refused


def _refused_families(kernel: str, why_not_sm90: str) -> dict[str, str]:
    if kernel.startswith("sm90"):
        return {"sm80": "sm90 comes first"}
    return {"sm90": why_not_sm90 or "the GPU's compute capability is not 9.0"}


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pfa.info", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="for programs")
    call = parser.add_argument_group(
        "a call to explain", "the arguments of torch.ops.pfa.forward; tensors of unset contents"
    )
    call.add_argument("--query", type=_shape, metavar="SHAPE", help="such as 2,4096,32,128")
    call.add_argument("--key", type=_shape, metavar="SHAPE", help="of value too; query's if absent")
    call.add_argument("--dtype", default="bfloat16", choices=["float16", "bfloat16", "int8"])
    call.add_argument("--layout", default="BNSD", choices=["BSH", "BSND", "BNSD", "BNSD_BSND"])
    call.add_argument("--num-heads", type=int, help="of query; needed for BSH")
    call.add_argument("--num-key-value-heads", type=int, default=0, help="needed for BSH")
    call.add_argument("--sparse-mode", type=int, default=0)
    call.add_argument("--atten-mask", action="store_true", help="a mask tensor, in modes 0 and 1")
    call.add_argument("--pse-shift", action="store_true", help="a bias for each batch element")
    call.add_argument("--int8-output", action="store_true")
    call.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def _call(args: argparse.Namespace) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """The described call. Memory that is not touched costs nothing on the CPU."""
    on = {"device": args.device}
    query = torch.empty(args.query, dtype=getattr(torch, args.dtype), **on)
    key = query.new_empty(args.key or args.query)
    axis = 1 if args.layout.startswith("BNSD") else 2
    rows = 2 if args.layout.startswith("BNSD") else 1
    heads = args.num_heads or (query.shape[axis] if query.dim() == 4 else 1)
    heads_k = args.num_key_value_heads or (key.shape[axis] if key.dim() == 4 else 0)
    sizes = query.shape[rows], key.shape[rows]
    one = torch.ones(1, **on)
    options: dict[str, Any] = {
        "input_layout": args.layout,
        "num_heads": heads,
        "num_key_value_heads": heads_k,
        "sparse_mode": args.sparse_mode,
    }
    if args.sparse_mode in (2, 3, 4):
        options["atten_mask"] = torch.empty(1, dtype=torch.bool, **on).expand(2048, 2048)
    elif args.atten_mask:
        options["atten_mask"] = torch.empty(sizes, dtype=torch.bool, **on)
    if args.pse_shift:
        dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float16
        options["pse_shift"] = torch.empty(query.shape[0], heads, *sizes, dtype=dtype, **on)
    if args.dtype == "int8":
        options |= {"deq_scale1": one, "quant_scale1": one, "deq_scale2": one}
    if args.int8_output:
        options["quant_scale2"] = one
    return (query, key, key), options


def _text(value: Any, indent: str = "") -> str:
    lines = []
    for name, entry in value.items():
        if isinstance(entry, dict) and entry:
            lines.append(f"{indent}{name}:\n{_text(entry, indent + '  ')}")
        elif isinstance(entry, list):
            shown = [x if isinstance(x, str) else " ".join(x.values()) for x in entry]
            lines.append(f"{indent}{name}: {', '.join(shown) or 'none'}")
        else:
            words = {"True": "yes", "False": "no", "None": "none", "{}": "none"}
            lines.append(f"{indent}{name}: {words.get(str(entry), entry)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    found = report()
    if args.query:
        try:
            tensors, options = _call(args)
            found["call"] = explain(*tensors, **options)
        except (ImportError, IndexError, RuntimeError) as error:
            found["call"] = {"error": str(error)}
    sys.stdout.write((json.dumps(found, indent=1) if args.json else _text(found)) + "\n")
    return 1 if "error" in found.get("call", {}) else 0


if __name__ == "__main__":
    sys.exit(main())
