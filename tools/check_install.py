# SPDX-License-Identifier: Apache-2.0
"""Installs pfa in every way, into environments with nothing but torch, and uses it there.

    check_install.py                                  this Python, torch 2.11.0 and 2.13.0
    check_install.py --torch 2.13.0 --python python3.10 python3.12 --ways wheel

An environment takes a minute and gigabytes where torch comes with CUDA, so it is kept in --folder
for the next time. Builds run against its torch, without another one in a build environment.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import distribution
from distribution import ROOT, run

WAYS = ("wheel", "sdist", "checkout")
USE = """
import torch
import pfa

assert "site-packages" in pfa.__file__, pfa.__file__
q, k, v = torch.randn(3, 2, 4, 100, 64).to(torch.bfloat16).unbind()
out = pfa.prompt_flash_attention(
    q, k, v, num_heads=4, input_layout="BNSD", scale_value=0.125, sparse_mode=3)
ref = torch.nn.functional.scaled_dot_product_attention(
    q.double(), k.double(), v.double(), is_causal=True, scale=0.125)
error = (out.double() - ref).abs().max().item()
assert error < 0.02, error
q = q.to("meta")
traced = torch.ops.pfa.forward(q, q, q, num_heads=4, input_layout="BNSD")
assert traced.shape == q.shape, traced.shape
print(f"Python {__import__('platform').python_version()}, torch {torch.__version__}, "
      f"{pfa.cpu_isa()}: largest error {error:.1e}")
"""


def environment(folder: pathlib.Path, python: str, torch: str) -> pathlib.Path:
    """The Python of an environment with torch and what builds need."""
    version = run(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    home = folder / f"py{version}-torch{torch}"
    if not (home / "ready").exists():
        run(python, "-m", "venv", home)
        tools = ["setuptools>=77", "ninja", "numpy"]  # torch warns where there is no NumPy
        run(home / "bin/python", "-m", "pip", "install", "-q", f"torch=={torch}", *tools)
        (home / "ready").touch()
    return home / "bin/python"


def install(python: pathlib.Path, what: pathlib.Path) -> float:
    """Seconds that pip took."""
    started = time.monotonic()
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"  # of ninja
    options = ["-q", "--no-build-isolation", "--no-deps", "--force-reinstall", "--no-cache-dir"]
    run(python, "-m", "pip", "install", *options, what, env=os.environ | {"PATH": path})
    return time.monotonic() - started


def use(python: pathlib.Path) -> str:
    """What USE prints, and that nothing but it is printed, outside the checkout."""
    with tempfile.TemporaryDirectory() as elsewhere:
        text = run(python, "-c", USE, cwd=elsewhere).strip()
        run(python, "-m", "pfa.info", "--json", cwd=elsewhere)
    if "\n" in text:
        sys.exit(f"more than one line was printed:\n{text}")
    return text


def remove(python: pathlib.Path) -> None:
    run(python, "-m", "pip", "uninstall", "-q", "-y", "pfa")
    with tempfile.TemporaryDirectory() as elsewhere:
        code = [str(python), "-c", "import pfa"]
        if subprocess.run(code, cwd=elsewhere, capture_output=True).returncode == 0:
            sys.exit(f"pfa can still be imported by {python} after it was uninstalled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", nargs="+", default=["2.11.0", "2.13.0"])
    parser.add_argument("--python", nargs="+", default=[sys.executable])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--cuda", action="store_true", help="compile the CUDA kernels too")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "build" / "check-install")
    args = parser.parse_args()
    os.environ.update({"FORCE_CUDA": "1"} if args.cuda else {"PFA_SKIP_CUDA": "1"})
    sdist, wheel = distribution.build(args.folder / "dist")
    print(*distribution.check(sdist, wheel), sep="\n", flush=True)
    sources = dict(zip(WAYS, (wheel, sdist, ROOT), strict=True))
    for torch in args.torch:
        for name in args.python:
            python = environment(args.folder, name, torch)
            for way in args.ways:
                seconds = install(python, sources[way])
                print(f"{way}: installed in {seconds:.0f} s. {use(python)}", flush=True)
                remove(python)


if __name__ == "__main__":
    main()
