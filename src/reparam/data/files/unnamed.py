"""Files whose suffix does not say that they hold rows: what they hold is told by their first bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from reparam.core.text import UTF_16
from reparam.data.files import jsonl
from reparam.data.files.opened import opened
from reparam.errors import DataError

Reader = Callable[[Path], Iterator[tuple[str, dict[str, Any] | DataError]]]

START = 4096  # bytes that are looked at
_JSON = 'write one JSON object per line (JSONL), such as {"text": "..."}'
_TABLE = "export the sheet as CSV"
_UNPACK = "unpack it, and give the folder or a file of it"
_UNSAFE = f"such files can run code when they are read, so they are not; {_JSON}"
WHAT = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods", ".numbers"), f"a spreadsheet; {_TABLE}"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), f"an archive; {_UNPACK}"),
    **dict.fromkeys((".bz2", ".xz", ".lz4", ".br"), "compressed in a way that is not read; use gzip or zstd"),
    **dict.fromkeys((".pkl", ".pickle", ".joblib", ".pt", ".pth", ".ckpt"), f"Python objects or tensors; {_UNSAFE}"),
    **dict.fromkeys((".h5", ".hdf5", ".npz", ".npy", ".mat"), f"arrays; {_JSON}"),
    **dict.fromkeys((".safetensors", ".gguf", ".bin"), "weights of a model, not rows"),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".html", ".htm"), f"a document; {_JSON}"),
    **dict.fromkeys((".md", ".rst", ".tex"), f"one text, not rows; {_JSON}, or name it .txt to make each line a row"),
    **dict.fromkeys((".xml", ".yaml", ".yml", ".toml"), f"no rows in a known form; {_JSON}"),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3"), f"a database; {_JSON}, or export a table as CSV"),
    **dict.fromkeys((".orc", ".avro", ".lance", ".tfrecord"), "rows in a form that is not read; convert it to Parquet"),
}
MAGIC = {
    b"PK\x03\x04": f"an archive or a spreadsheet; {_UNPACK}, or {_TABLE}",
    b"\xd0\xcf\x11\xe0": f"a file of an office program; {_TABLE}",
    b"\x1f\x8b": "compressed with gzip; let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; let its name end in .zst",
    b"PAR1": "a Parquet file; let its name end in .parquet",
    b"ARROW1": "an Arrow file; let its name end in .arrow",
    b"%PDF": f"a document; {_JSON}",
    b"\x89HDF": f"arrays; {_JSON}",
    b"\x93NUMPY": f"arrays; {_JSON}",
    b"\x80\x02": f"Python objects; {_UNSAFE}",
    b"\x80\x04": f"Python objects; {_UNSAFE}",
    b"\x80\x05": f"Python objects; {_UNSAFE}",
    b"SQLite format 3": f"a database; {_JSON}",
}


def reader(path: Path, suffix: str, *, text: Reader | None = None) -> Reader:
    """The reader of a file with this suffix, which no format has: JSONL and JSON lists are told by how they begin.

    `text` reads what is neither. Without it, such a file is refused: raises DataError that says what it is and what to
    do instead. What cannot be read twice, such as a pipe, is taken for JSONL.
    """
    if not path.is_file():
        return jsonl.read
    with opened(path) as file:
        start = file.read(START)
    content = start.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    if content.startswith(b"["):
        return jsonl.read_json if text is None else _list_or(text, content)
    if not content or content.startswith(b"{") or start.startswith(UTF_16):
        return jsonl.read
    magic = next((what for begin, what in MAGIC.items() if start.startswith(begin)), "")
    if text is not None and not magic:
        return text
    what = WHAT.get(suffix) or magic or f"no rows that are known by the suffix {suffix!r}; {_JSON}"
    if not suffix and not magic:
        what = f"no JSON, and its name has no suffix that says what it holds; {_JSON}"
    raise DataError([f"{path}: holds {what}"])


def _list_or(text: Reader, content: bytes) -> Reader:
    """The reader of a file that begins with a bracket, such as that of a note in a text."""
    return jsonl.read_json if content[1:].lstrip(b" \t\r\n").startswith(b"{") else text
