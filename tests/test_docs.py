# SPDX-License-Identifier: Apache-2.0
"""What users copy from README and the quick start runs, and both languages say the same."""

from __future__ import annotations

import pathlib
import re

import drawing
import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ["README.md", "README.zh-CN.md", "docs/index.md", "docs/index.zh-CN.md"]
MODEL_OR_BUILD = ("transformers", "jit.load")  # tested where they are at home


def blocks(page: str) -> list[str]:
    """The Python of a page that a process can run from top to bottom."""
    found = re.findall(
        r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE
    )
    return [code for code in found if not any(word in code for word in MODEL_OR_BUILD)]


@pytest.mark.parametrize("page", PAGES)
def test_examples_of_a_page_run(page: str) -> None:
    names: dict[str, torch.Tensor] = {}
    for code in blocks(page):
        exec(code, names)
        assert names["out"].shape == names["q"].shape and names["out"].isfinite().all()


@pytest.mark.parametrize(("english", "chinese"), [PAGES[:2], PAGES[2:]])
def test_languages_show_the_same_code(english: str, chinese: str) -> None:
    def plain(code: str) -> list[str]:
        return [re.sub(r"#.*", "", line).rstrip() for line in code.splitlines()]

    assert [plain(x) for x in blocks(english)] == [plain(x) for x in blocks(chinese)]


def test_chinese_semantics_has_every_section_and_table_row() -> None:
    pages = [(ROOT / "docs" / f"semantics{x}.md").read_text() for x in ("", ".zh-CN")]
    english, chinese = (re.findall(r"^## (\d+)\. ", page, re.MULTILINE) for page in pages)
    assert english == chinese
    rows = [len(re.findall(r"^\|", page, re.MULTILINE)) for page in pages]
    assert rows[0] == rows[1]


def test_readme_lists_every_variable() -> None:
    read = set()
    for folder, pattern in (("pfa", "*.py"), ("csrc", "*.[ch]*")):
        for path in (ROOT / folder).rglob(pattern):
            read |= set(re.findall(r"(?:getenv|environ\S*?)[(\[]\"(PFA_\w+)", path.read_text()))
    assert {"PFA_LOG", "PFA_LIBRARY", "PFA_CPU_ISA"} <= read
    for page in ("README.md", "README.zh-CN.md"):
        text = (ROOT / page).read_text()
        assert [name for name in sorted(read) if f"`{name}`" not in text] == []


def test_pictures_are_compared_up_to_rounding() -> None:
    one = '<g id="p1a"><path d="M 1.000001 2 L -3e-5 4" clip-path="url(#p1a)"/></g>'
    assert drawing.is_same(one, one.replace("p1a", "p2b").replace("1.000001", "1.0"))
    assert not drawing.is_same(one, one.replace("M 1.000001", "M 1.2"))
    assert not drawing.is_same(one, one.replace("L", "C"))
    assert not drawing.is_same(one, one.replace(" L -3e-5 4", ""))
