"""Measure memory and CPU time of reading and encoding a large file, and what follows for 1 GB.

The file is JSONL with random rows: words of a vocabulary of 30,000, drawn with frequencies as in natural text; texts,
chats, or prompts with completions. A separate process reads and encodes it with the embedded model's tokenizer, as
`reparam train` does for its cache. CPU seconds are those of this process and of the one that renders chats. "Resident"
is the peak of resident memory, including pages of files, minus the resident memory before reading (the kernel's
high-water mark, which is reset first). "Alone" is what the fast tokenizer's own `encode_batch` takes for
the contents of the first rows, on one core and in the same process: on a machine with other work, CPU seconds grow, and
this tells by how much. For 1 GB, CPU seconds grow in proportion to the size, and memory by the slope
between a quarter of the file and the whole file.

    python benchmarks/data.py            # 100 MB
    python benchmarks/data.py --mb 10
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"CPU seconds": 120.0, "resident, GB": 0.3}
KINDS = ("texts", "chats", "completions")


def write(file: Path, kind: str, size: int) -> None:
    """Write rows of a kind until the file has this many bytes."""
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(draw.choices(letters, k=min(12, max(1, int(draw.gauss(5, 2.5)))))) for _ in range(30_000)]
    total = list(itertools.accumulate(1 / (rank + 10) for rank in range(len(words))))

    def sentences(count: int) -> str:
        chosen = [" ".join(draw.choices(words, cum_weights=total, k=draw.randint(5, 25))) for _ in range(count)]
        return " ".join(f"{sentence.capitalize()}." for sentence in chosen)

    with file.open("w") as out:
        while out.tell() < size:
            question, answer = sentences(draw.randint(1, 3)), sentences(draw.randint(1, 12))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            row = {
                "texts": {"text": answer + " " + sentences(draw.randint(1, 25))},
                "chats": {"messages": messages * draw.choice((1, 1, 1, 2, 3))},
                "completions": {"prompt": question, "completion": " " + answer},
            }[kind]
            out.write(json.dumps(row) + "\n")


def measure(file: Path) -> dict[str, float]:
    """Encode the file in this process."""
    import reparam.train.run  # noqa: F401  (what a training run imports)
    from reparam.data.encode import encode_all
    from reparam.data.rendering import _process
    from reparam.data.row import Row
    from reparam.data.rows import Reading
    from reparam.hf.models import load_tokenizer

    tokenizer = load_tokenizer(str(ROOT / "assets/tiny-python"))
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    encode_all([Row("chat", "warm-up:1", messages=messages)], tokenizer, max_length=1024)
    _process.end()
    Path("/proc/self/clear_refs").write_text("5")
    before, began = _resident("VmRSS"), _seconds()
    with tempfile.TemporaryDirectory() as folder:
        corpus = encode_all(Reading([file]), tokenizer, max_length=1024, folder=Path(folder))
        _process.end()
        report = corpus.part().report
    seconds = _seconds() - began
    return {
        "CPU seconds": seconds,
        "alone, s/GB": _alone(file, tokenizer),
        "resident, GB": _resident("VmHWM") - before,
        "tokens": report.tokens,
        "rows": report.rows,
        "all, GB": _resident("VmHWM"),
    }


def _alone(file: Path, tokenizer: Any) -> float:
    """CPU seconds per GB of the file that the tokenizer takes for the contents of its first rows."""
    with file.open() as opened:
        lines = list(itertools.islice(opened, 500))
    rows = [json.loads(line) for line in lines]
    contents = [
        value if isinstance(value, str) else "\n".join(message["content"] for message in value)
        for row in rows
        for value in row.values()
    ]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    began = _seconds()
    tokenizer.backend_tokenizer.encode_batch(contents, add_special_tokens=False)
    return (_seconds() - began) * 1e9 / sum(map(len, lines))


def _seconds() -> float:
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _resident(name: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024 / 1e9


def main() -> None:
    """Measure each kind and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=100)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.file is not None:
        print(json.dumps(measure(given.file)))
        return
    print(f"| {given.mb:g} MB of | rows | tokens | CPU s | resident | 1 GB: CPU s | alone | 1 GB: resident | limits |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in given.kinds.split(","):
        found = []
        for share in (0.25, 1.0):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "rows.jsonl"
                write(file, kind, int(given.mb * share * 1e6))
                command = [sys.executable, __file__, "--file", str(file)]
                found.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
        small, whole = found
        seconds = whole["CPU seconds"] * 1000 / given.mb
        slope = (whole["resident, GB"] - small["resident, GB"]) / (given.mb * 0.75)
        memory = whole["resident, GB"] + max(slope, 0) * (1000 - given.mb)
        marks = [" (missed)" if v > limit else "" for v, limit in zip((seconds, memory), LIMITS.values(), strict=True)]
        print(
            f"| {kind} | {whole['rows']:,} | {whole['tokens']:,} | {whole['CPU seconds']:.1f} "
            f"| {whole['resident, GB']:.3f} GB | {seconds:.0f}{marks[0]} "
            f"| {whole['alone, s/GB']:.0f} | {memory:.2f} GB{marks[1]} | 120 s, 0.3 GB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
