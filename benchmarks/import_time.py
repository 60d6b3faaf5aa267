"""Measure CPU seconds (user and system) of imports and of command-line calls, each in a fresh interpreter.

The contestants take turns in an order that rotates. Each figure is a median and is shown with its limit. `train` is
measured up to its first printed line, and up to the table of trained parameters, before which it loads the model and
the rows.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import measure as m

ASSETS = Path(__file__).parents[1] / "assets"
MAIN = "import sys; sys.argv[0] = 'reparam'; from reparam.cli import main; main()"
TRANSFORMERS = "import torch; from transformers import AutoModelForCausalLM, LlamaForCausalLM"
IMPORTS = {name: ["-c", f"import {name}"] for name in ("torch", "reparam", "peft")}
IMPORTS["reparam.attach"] = ["-c", "import reparam; reparam.attach"]
VERBS = {
    "--help": ["--help"],
    "--version": ["--version"],
    "merge --help": ["merge", "--help"],
    "inspect --help": ["inspect", "--help"],
    "quantize --help": ["quantize", "--help"],
    "train --help": ["train", "--help"],
}
TRL = "import sys; sys.argv = ['trl', 'sft', '--help']; from trl.cli import main; main()"
OTHERS = {"trl sft --help": ["-c", TRL]}
# Arguments, and text in the printed line at which the measurement stops; "" stops at the first line.
LINES = {
    "torch and a llama of transformers": ([f"{TRANSFORMERS}; print('imported')"], ""),
    "train, to its first line": ([MAIN, "train"], ""),
    "train, to what will be trained": ([MAIN, "train"], "will be trained"),
}
LIMITS = {
    "--help": ("", 0.3),
    "--version": ("", 0.3),
    **dict.fromkeys(["reparam.attach", *list(VERBS)[2:]], ("torch", 0.3)),
    "train, to its first line": ("torch and a llama of transformers", 0.3),
}


def seconds(arguments: list[str]) -> float:
    """CPU seconds of one interpreter."""
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        return _used(process, 0)


def seconds_to_line(arguments: list[str], text: str) -> float:
    """CPU seconds of one interpreter until it prints a line with `text`; it is killed then."""
    with subprocess.Popen(
        [sys.executable, "-u", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        if not any(text in line.decode() for line in process.stdout):
            raise RuntimeError(f"{arguments} printed no line with {text!r}")
        process.kill()
        return _used(process, None)


def _used(process: subprocess.Popen[bytes], expected: int | None) -> float:
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if expected is not None and process.returncode != expected:
        raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime


def main() -> None:
    quick = m.setup(__doc__)
    commands = IMPORTS | {verb: ["-c", MAIN, *words] for verb, words in VERBS.items()}
    try:
        import trl  # noqa: F401
    except ImportError:
        pass
    else:
        commands |= OTHERS
    names = [*commands, *LINES]
    found: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        rows = ASSETS / "tasks" / "signatures" / "train.jsonl"
        run = ["--base", str(ASSETS / "tiny-python"), "--data", str(rows), "-o", str(Path(folder) / "out")]
        for turn in range(2 if quick else 8):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if name in LINES:
                    words, text = LINES[name]
                    took = seconds_to_line(["-c", *words, *run], text)
                else:
                    took = seconds(commands[name])
                found[name].append(took)
    medians = {
        name: statistics.median(times[1:]) for name, times in found.items()
    }  # the first run fills the file cache
    print("| CPU seconds | measured | over import torch | limit |\n|---|---|---|---|")
    for name, value in medians.items():
        over, limit = LIMITS.get(name, ("", 0.0))
        shown = f"{limit + medians.get(over, 0):.2f}" + (f" ({limit} over {over})" if over else "") if limit else ""
        print(f"| `{name}` | {value:.2f} | {value - medians['torch']:+.2f} | {shown} |")
    print("\npython benchmarks/import_time.py")


if __name__ == "__main__":
    main()
