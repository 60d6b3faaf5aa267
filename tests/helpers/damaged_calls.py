"""Calls of the command line on a workspace in which one file was damaged, from a seed.

`python tests/helpers/damaged_calls.py FIRST LAST [WORD]` tries these seeds of every call whose name has the word.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gzip
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
from command import TASK
from damage import damage
from models import save_base

from reparam.cli import main

SECONDS = 60  # after which a call hangs
LONGEST = 6000  # characters of an error
SIZES = ["--batch_size", 2, "--learning_rate", 0.05, "--data.score_rows", 1, "--save_steps", 1, "--lora_r", 2]
FORMATS = ("jsonl", "json", "csv", "parquet", "arrow", "jsonl.gz", "jsonl.zst")


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of the command line in the workspace."""

    damaged: str
    """The file or folder of the workspace in which something is damaged."""
    words: tuple[Any, ...]
    """The words of the call, with paths relative to the workspace."""
    output: str | None = None
    """What the call writes; it must not be there after a failure."""


def train(data: str, out: str, *more: object) -> tuple[Any, ...]:
    return ("train", "--base.path", "base", "--data.train", data, "-o", out, *SIZES, *more)


CALLS = {
    "resume": Call("run", train("data/rows.jsonl", "run", "--max_steps", 3)),
    **{f"train on {end}": Call(f"data/rows.{end}", train(f"data/rows.{end}", "new"), "new/adapter") for end in FORMATS},
    "train on a base": Call("base", train("data/rows.jsonl", "new", "--max_steps", 1), "new/adapter"),
    "generate": Call("a", ("generate", "def f(x):", "-a", "a", "-b", "base", "--max-new-tokens", 2)),
    "generate with a run": Call("run", ("generate", "def f(x):", "-a", "run", "-b", "base", "--max-new-tokens", 2)),
    "generate with a base": Call("base", ("generate", "def f(x):", "-b", "base", "--max-new-tokens", 2)),
    "generate with nf4": Call("nf4", ("generate", "def f(x):", "-b", "nf4", "--max-new-tokens", 2)),
    "eval": Call("data/rows.parquet", ("eval", "data/rows.parquet", "-a", "a", "-b", "base", "--batch-size", 6)),
    "eval of an adapter": Call("peft", ("eval", "data/rows.jsonl", "-a", "peft", "-b", "base")),
    "merge": Call("a", ("merge", "new", "-a", "a", "-b", "base"), "new"),
    "merge onto a base": Call("base", ("merge", "new", "-a", "peft", "-b", "base"), "new"),
    "inspect": Call("a", ("inspect", "a")),
    "inspect a run": Call("run", ("inspect", "run")),
    "inspect nf4": Call("nf4", ("inspect", "nf4")),
    "inspect PEFT": Call("peft", ("inspect", "peft", "-b", "base")),
    "compose": Call("a", ("compose", "a", "peft", "-o", "new"), "new"),
    "compose PEFT": Call("peft", ("compose", "a", "peft", "-o", "new"), "new"),
    "compress": Call("a", ("compress", "a", "new", "--rank", 1), "new"),
    "quantize": Call("base", ("quantize", "base", "new", "--storage", "nf4"), "new"),
}


def make(root: Path) -> None:
    """The workspace: a base, the same quantized, data of every kind, a run with checkpoints, and two adapters."""
    rows = [json.loads(line) for line in (TASK / "train.jsonl").read_text().splitlines()[:6]]
    pairs = [{"prompt": row["messages"][0]["content"], "completion": row["messages"][1]["content"]} for row in rows]
    data = root / "data"
    data.mkdir(parents=True)
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs).encode()
    (data / "rows.jsonl").write_bytes(lines)
    (data / "rows.json").write_text(json.dumps(pairs))
    with (data / "rows.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "completion"])
        table.writeheader()
        table.writerows(pairs)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pairs), data / "rows.parquet")
    pyarrow.feather.write_feather(pyarrow.Table.from_pylist(pairs), data / "rows.arrow")
    (data / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    with pyarrow.output_stream(str(data / "rows.jsonl.zst"), compression="zstd") as stream:
        stream.write(lines)
    save_base(root / "base", tie_word_embeddings=True)
    with _inside(root):
        for words in (
            train("data/rows.jsonl", "run", "--max_steps", 2),
            ("compress", "run", "a", "--rank", 2),
            ("compress", "run", "peft", "--rank", 1, "--format", "peft"),
            ("quantize", "base", "nf4", "--storage", "nf4"),
        ):
            code, out, err = called(words, seconds=20 * SECONDS)
            assert code == 0, (words, out, err)


def attempt(name: str, original: Path, folder: Path, seed: int) -> tuple[str, str]:
    """Damage a copy of the workspace and make the call: the damage and the outcome, "WRONG..." for a fault."""
    call, draw = CALLS[name], random.Random(f"{name} {seed}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    place = folder / call.damaged
    done = damage(place, draw) if place.is_dir() else damage(place.parent, draw, only=place.name)
    hidden = _hidden(folder)
    with _inside(folder):
        try:
            code, out, err = called(call.words)
        except TimeoutError:
            if done.endswith(": pipe") and call.damaged.startswith("data/"):
                return done, "waits for a writer of the pipe"
            return done, f"WRONG: hangs for {SECONDS} s"
        except BaseException:
            return done, "WRONG: " + traceback.format_exc()[-600:]
    text = out + err
    if "Traceback" in text:
        return done, "WRONG: " + text[text.index("Traceback") :][-600:]
    if code not in (0, 1, 2):
        return done, f"WRONG: exit code {code}"
    if any(ord(letter) < 32 and letter != "\n" for letter in text):
        return done, "WRONG: control characters"
    if left := _hidden(folder) - hidden:
        return done, f"WRONG: left behind {sorted(left)}"
    if code == 0:
        return done, "done"
    if call.output is not None and (folder / call.output).exists():
        return done, f"WRONG: exit code {code}, and {call.output} is there"
    told = [line for line in err.splitlines() if line.lower().startswith(("error:", "failed:"))]
    if len(told) != 1:
        return done, f"WRONG: {len(told)} errors: {err[-600:]}"
    said = err[err.index(told[0]) :]
    return done, f"WRONG: {len(said)} characters" if len(said) > LONGEST else f"refused: {said.strip()}"


def _hidden(folder: Path) -> set[str]:
    """Files and folders of writes that did not end."""
    found = (path for path in folder.rglob(".*") if path.name not in (".lock",))
    return {path.relative_to(folder).as_posix() for path in found}


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def called(words: tuple[Any, ...], seconds: int = SECONDS) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a call in this process."""

    def late(*_: object) -> None:
        raise _Late

    out, err, arguments = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["reparam", *map(str, words)]
    alarm: Callable[..., Any] = signal.signal(signal.SIGALRM, late)  # type: ignore[assignment]
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as ended:
        return (ended.code if isinstance(ended.code, int) else 1), out.getvalue(), err.getvalue()
    except _Late:
        raise TimeoutError from None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)
        sys.argv = arguments
    return 0, out.getvalue(), err.getvalue()


class _Late(BaseException):
    """A call took too long. No Exception, so that nothing handles it."""


if __name__ == "__main__":
    first, last, word = int(sys.argv[1]), int(sys.argv[2]), " ".join(sys.argv[3:])
    with tempfile.TemporaryDirectory() as root:
        make(Path(root) / "original")
        for number in range(first, last):
            for name in [name for name in CALLS if word in name]:
                damage_done, found = attempt(name, Path(root) / "original", Path(root) / "copy", number)
                print(number, name, "|", damage_done, "|", found.replace("\n", " / ")[:700], flush=True)
