"""Read the text for the embedded model and tasks: the source files of the running Python's standard library.

A file is held out if the first byte of the SHA-256 of its path (relative to the library, with forward slashes) is below
26, which holds for about one file in ten. Pre-training and the tasks over signatures use the same rule, so no
evaluation uses a file that anything was trained on.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# encodings/ has tables of characters, pydoc_data/ is the `reference` task, and the rest is installed or generated.
LEFT_OUT = ("encodings/", "pydoc_data/", "site-packages/", "lib-dynload/", "config-", "_sysconfigdata", "__pycache__/")


def held_out(path: str) -> bool:
    """Whether the file at `path`, relative to the standard library, is kept for evaluation."""
    return hashlib.sha256(path.encode()).digest()[0] < 26


def files() -> Iterator[tuple[str, str]]:
    """Yield (relative path, text) of the source files of the standard library, sorted by path."""
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
