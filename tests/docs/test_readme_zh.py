"""README.zh-CN.md is in step with README.md: the same outline, code, links and numbers, in the same order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
FACT = re.compile(r"`[^`]+`|(?<=\]\()[^)]+|(?<![A-Za-z0-9])\d+(?:\.\d+)*")  # code, target of a link, number


def outline(text: str) -> list[tuple[str, list[str]]]:
    """Each block with its kind: a code block with its text, every other block with its facts.

    The kinds are a heading with its level, a table row, a list item and a paragraph. The line that links to the other
    language is left out.
    """
    codes = CODE.findall(text)
    found: list[tuple[str, list[str]]] = []
    title, languages, *rest = CODE.sub("```", text).split("\n\n")
    assert "README" in languages
    for part in (title, *rest):
        for block in re.split(r"\n(?=- |\|)", part.strip()):
            mark = block.split(" ", 1)[0]
            if mark == "```":
                found.append(("code", [codes.pop(0)]))
            elif mark.startswith("|"):
                found.append((f"row of {len(re.findall(r'(?<!`)[|]', block))}", FACT.findall(block)))
            else:
                kind = mark if set(mark) <= set("#") else "item" if mark == "-" else "paragraph"
                found.append((kind, FACT.findall(block)))
    assert not codes, "a code block is not between blank lines"
    return found


def test_the_chinese_readme_says_what_the_english_one_says() -> None:
    english, chinese = outline(ENGLISH), outline(CHINESE)
    for one, other in zip(english, chinese, strict=False):
        assert one == other
    assert len(english) == len(chinese)
    kinds = {kind for kind, _ in english}
    assert kinds == {"#", "##", "code", "row of 3", "item", "paragraph"}


@pytest.mark.parametrize(
    "change",
    [
        ("--max_steps 100", "--max_steps 200"),  # a command
        ("docs/dora.md)", "docs/qlora.md)"),  # a link in a table
        ("`Conv1D`", "`Conv2d`"),  # a name in a table
        ("80 ", "90 "),  # a number
        ("\n| | AdaLoRA", " AdaLoRA"),  # a row
        ("\n- **", "\n**"),  # a list item
        ("\n## ", "\n### "),  # a heading
    ],
    ids=lambda change: change[0].strip(),
)
def test_a_change_in_one_of_them_is_found(change: tuple[str, str]) -> None:
    for text in (ENGLISH, CHINESE):
        assert outline(text.replace(*change, 1)) != outline(text)


def test_each_links_to_the_other_in_its_first_lines() -> None:
    for text, other in ((ENGLISH, "README.zh-CN.md"), (CHINESE, "README.md")):
        assert f"]({other})" in "".join(text.splitlines()[:4])


def test_paragraphs_in_chinese_are_one_line() -> None:
    """A line break between two Chinese characters is shown as a space."""
    assert not re.search(r"[^\x00-\x7f]\n[^\x00-\x7f]", CODE.sub("", CHINESE))


def test_bold_text_in_chinese_ends_before_its_punctuation() -> None:
    """`**文字。**文字` is not bold in CommonMark: the closing marks are between punctuation and a letter."""
    assert not re.search(r"[，。：；！？）]\*\*\w", CODE.sub("", CHINESE))
