"""The text that the embedded model and tasks are made from: the sources of the running Python's standard library.

A file belongs to the held-out side when the first byte of the SHA-256 of its path (relative to the library, with
forward slashes) is below 26, which is one file in ten. Pre-training and both tasks use the same rule, so that no file
that an evaluation looks at was ever trained on, by anything.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# encodings: tables of characters. pydoc_data: kept for the `reference` task. The rest: made by the build, holds paths.
LEFT_OUT = ("encodings/", "pydoc_data/", "site-packages/", "lib-dynload/", "config-", "_sysconfigdata", "__pycache__/")


def held_out(path: str) -> bool:
    """Whether the file at `path`, relative to the standard library, is kept for evaluation."""
    return hashlib.sha256(path.encode()).digest()[0] < 26


def files() -> Iterator[tuple[str, str]]:
    """Every source file of the standard library as (relative path, text), sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if path.startswith(LEFT_OUT) or "/__pycache__/" in path:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few test files are broken on purpose
            continue
        if text.strip():
            yield path, text
