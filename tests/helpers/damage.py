"""Damage one file of a folder at random, from a seed: the bytes, the entry in the folder, JSON values, tensors."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DEPTH = 100_000
LONG = "x" * 1_000_000
# What a value of a JSON file becomes: the text in the file.
VALUES = {
    "null": "null",
    "true": "true",
    "-1": "-1",
    "0": "0",
    "1e400": "1e400",
    "NaN": "NaN",
    "1.5": "1.5",
    "2**70": str(2**70),
    "10**5000": "9" * 5000,
    "''": '""',
    "a word": '"abc"',
    "half a surrogate": '"\\ud800"',
    "a path": '"../../../etc/passwd"',
    "1 MB": json.dumps(LONG),
    "[]": "[]",
    "{}": "{}",
    "[null]": "[null]",
    "{'a': 1}": '{"a": 1}',
    "deep": "[" * DEPTH + "]" * DEPTH,
}


class Text(str):
    """A text to write into a JSON file as it is."""


class Pairs(list[tuple[str, Any]]):
    """An object with its keys in order; a key can occur twice."""


def dump(value: Any) -> str:
    """JSON, with `Text` and `Pairs`."""
    if isinstance(value, Text):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {dump(one)}" for key, one in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


def damage(folder: Path, draw: random.Random, *, only: str | None = None) -> str:
    """Damage one file of the folder, or the file `only`; what was done, as a text."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    name = only or draw.choice(files)
    file = folder / name
    ways: list[Callable[[Path, random.Random], str]] = [in_bytes, in_folder]
    if file.suffix == ".json":
        ways += [in_json] * 6
    if file.suffix == ".jsonl":
        ways += [in_json_line] * 6
    if file.suffix == ".safetensors":
        ways += [in_tensors] * 6
    if file.suffix == ".toml":
        ways += [in_toml] * 6
    return f"{name}: {draw.choice(ways)(file, draw)}"


# ---- bytes and entries


def in_bytes(file: Path, draw: random.Random) -> str:
    """Cut, flip, insert."""
    content = bytearray(file.read_bytes())
    size = len(content)
    way = draw.choice(["cut", "flip", "flip", "end", "bom", "utf-16", "no utf-8", "zeros", "nul", "newline"])
    place = draw.choice([0, 1, 7, 8, 9, size // 2, max(size - 1, 0), draw.randrange(size + 1)])
    if way == "cut":
        del content[place:]
    elif way == "flip":
        for _ in range(draw.choice([1, 1, 5, 100])):
            content[draw.randrange(size)] ^= 1 << draw.randrange(8)
    elif way == "end":
        content += draw.choice([b"\0", b"x", b"{}", bytes(1000)])
    elif way == "bom":
        content[:0] = b"\xef\xbb\xbf"
    elif way == "utf-16":
        content = bytearray(content.decode(errors="replace").encode("utf-16"))
    elif way == "no utf-8":
        content[place:place] = draw.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80"])
    elif way == "zeros":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    else:
        content[place:place] = b"\0" if way == "nul" else b"\n"
    file.write_bytes(bytes(content))
    return f"{way} at {place} of {size}"


def in_folder(file: Path, draw: random.Random) -> str:
    """Replace the entry in the folder."""
    way = draw.choice(["folder", "dangling link", "loop", "empty", "pipe", "gone", "unreadable", "endless", "other"])
    others = [path for path in file.parent.iterdir() if path.is_file() and path != file]
    content = others[0].read_bytes() if others else b"other"
    file.unlink()
    if way == "folder":
        file.mkdir()
    elif way == "dangling link":
        file.symlink_to("nothing-here")
    elif way == "loop":
        file.symlink_to(file.name)
    elif way == "empty":
        file.touch()
    elif way == "pipe":
        os.mkfifo(file)
    elif way == "unreadable":
        file.symlink_to("/proc/self/mem")  # a regular file; reading it fails with EIO
    elif way == "endless":
        file.symlink_to("/dev/zero")
    elif way == "other":
        file.write_bytes(content)
    return way


# ---- JSON


def in_json(file: Path, draw: random.Random) -> str:
    """Change a value or a key of a JSON file."""
    value = json.loads(file.read_bytes(), object_pairs_hook=Pairs)
    text, said = changed(value, draw)
    file.write_text(text)
    return said


def in_json_line(file: Path, draw: random.Random) -> str:
    """Change a value or a key in one line."""
    lines = file.read_text().split("\n")
    number = draw.choice([i for i, line in enumerate(lines) if line])
    lines[number], said = changed(json.loads(lines[number], object_pairs_hook=Pairs), draw)
    file.write_text("\n".join(lines))
    return f"line {number + 1}: {said}"


def changed(value: Any, draw: random.Random) -> tuple[str, str]:
    """The JSON text with one change, and what it is."""
    path: list[Any] = []
    parent, at = [value], 0
    while True:  # down the tree, as far as the draw goes
        inner = parent[at][1] if isinstance(parent, Pairs) else parent[at]
        if not isinstance(inner, list) or not inner or (path and draw.random() < 0.25):
            break
        parent, at = inner, draw.randrange(len(inner))
        path.append(parent[at][0] if isinstance(parent, Pairs) else at)
    where = ".".join(map(str, path)) or "all"
    way = draw.choice(["value"] * 6 + ["gone", "twice", "renamed"])
    if way == "value" or not path:
        name = draw.choice(list(VALUES))
        new = Text(VALUES[name])
        parent[at] = (parent[at][0], new) if isinstance(parent, Pairs) else new
        return dump([value][0] if path else new), f"{where} = {name}"
    if way == "gone":
        del parent[at]
    elif way == "twice":
        again = (parent[at][0], Text(draw.choice(list(VALUES.values())))) if isinstance(parent, Pairs) else parent[at]
        parent.insert(draw.choice([at, at + 1]), again)
    elif isinstance(parent, Pairs):
        key = draw.choice([parent[at][0] + "x", "", "é", "__class__", LONG[:5000], parent[at][0].upper()])
        parent[at] = (key, parent[at][1])
        way = f"renamed {key[:20]!r}"
    return dump(value), f"{where} {way}"


# ---- TOML

TOML_VALUES = [
    "true", "-1", "0", "1e400", "nan", "inf", "1.5", str(2**70), '""', '"abc"', '"\\u0000"', "[]", "{}", "[1]", '["a"]',
    "{a = 1}", "1979-05-27", "07:32:00", f'"{LONG}"', "[" * 3000 + "]" * 3000,
]  # fmt: skip


def in_toml(file: Path, draw: random.Random) -> str:
    """Change a value, a key, or a header."""
    lines = file.read_text().split("\n")
    number = draw.choice([i for i, line in enumerate(lines) if line.strip()])
    line = lines[number]
    way = draw.choice(["value"] * 6 + ["gone", "twice", "renamed"])
    if way == "value" and "=" in line:
        value = draw.choice(TOML_VALUES)
        lines[number] = f"{line.partition('=')[0]}= {value}"
        way = value[:20]
    elif way == "gone":
        del lines[number]
    elif way == "twice":
        lines.insert(number, line)
    else:
        lines[number] = re.sub(r"\w+", lambda found: found[0] + draw.choice(["x", "_", ".a"]), line, count=1)
    file.write_text("\n".join(lines))
    return f"line {number + 1} ({line[:30]}): {way}"


# ---- tensors


def in_tensors(file: Path, draw: random.Random) -> str:
    """Change the header or the values of a safetensors file."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    start, end = entry["data_offsets"]
    way = draw.choice(
        ["renamed", "shape", "dtype", "offsets", "flip", "flip", "nan", "gone", "header", "length", "data cut", "swap"]
    )
    said = way
    length = None
    if way == "renamed":
        header[draw.choice([name + "x", "", "é", name.upper(), f"{name}.weight", "../x", "x\n\x1b[31my"])] = header.pop(
            name
        )
    elif way == "shape":
        old = entry["shape"]
        new = [old[::-1], [*old, 1], [1, *old], [], [0], [-1], [2**63], [2**40, 2**40], [1.5], None, [end - start]]
        entry["shape"] = draw.choice(new)
        said = f"shape {old} -> {entry['shape']}"
    elif way == "dtype":
        entry["dtype"] = draw.choice(["F16", "I32", "BF16", "F64", "U8", "BOOL", "F8_E4M3", "X", None, 3, "C64"])
        said = f"dtype {entry['dtype']}"
    elif way == "offsets":
        entry["data_offsets"] = draw.choice(
            [[start, end + 4], [start + 4, end], [end, start], [0, end - start], [-4, end], [start], [start, 2**63],
             [0, 0], None, "x", [start, 1e300], [start + 4, end + 4]]
        )  # fmt: skip
        said = f"offsets {start, end} -> {entry['data_offsets']}"
    elif way == "flip":
        place = draw.randrange(start, end)
        data[place] ^= 1 << draw.randrange(8)
        said = f"flip at {place - start}"
    elif way == "nan":
        kind = {"F32": "<f", "F16": "<e", "F64": "<d"}.get(entry["dtype"])
        packed = struct.pack(kind, draw.choice([float("nan"), float("inf")])) if kind else b"\xff\x7f"
        data[start : start + len(packed)] = packed
    elif way == "gone":
        del header[name]
    elif way == "header":
        text, said = changed(json.loads(json.dumps(header), object_pairs_hook=Pairs), draw)
    elif way == "length":
        length = draw.choice([0, 1, size + 1, size - 1, len(content), 2**40, 2**64 - 1])
    elif way == "data cut":
        del data[draw.randrange(len(data)) :]
    else:
        other = draw.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], header[name]
        said = f"swap with {other}"
    raw = (text if way == "header" else json.dumps(header)).encode()
    raw += b" " * (-len(raw) % 8)
    file.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + bytes(data))
    return f"{name} {said}"


# ---- digests


def sign(folder: Path) -> bool:
    """Write valid digests into a damaged adapter of reparam's format; whether that is possible."""
    file, weights = folder / "adapter.json", folder / "adapter.safetensors"
    if not (file.is_file() and weights.is_file()) or file.is_symlink() or weights.is_symlink():
        return False
    try:
        values = json.loads(file.read_bytes())
        values["weights"]["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
        values.pop("digest", None)
        values["digest"] = hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).hexdigest()
        file.write_text(json.dumps(values))
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError, MemoryError):
        return False
    return True


def copies(original: Path, folder: Path, seeds: range, name: str) -> Iterator[tuple[int, random.Random]]:
    """For each seed, a new copy of the folder at the same path, and the draw."""
    for seed in seeds:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        yield seed, random.Random(f"{name} {seed}")
