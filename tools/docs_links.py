# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs: what pages of docs/ link to outside docs/ becomes part of the site.

In the repository `../benchmarks/results/x.json` is a file beside docs/. In the site it lies under
files/, so that the same link works in both and a dead one fails the build.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)\)")


def on_files(files: Any, config: Any) -> Any:
    pages = [pathlib.Path(page.abs_src_path) for page in files.documentation_pages()]
    for name in sorted({name for page in pages for name in OUTSIDE.findall(page.read_text())}):
        if (ROOT / name).is_file():
            path = str(ROOT / name)
            files.append(File.generated(config, f"files/{name}", abs_src_path=path))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(r"](files/\1)", markdown)
