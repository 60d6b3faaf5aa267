"""CPU seconds, user and system, of fresh interpreters: imports over torch's, and what the command line takes to answer.

The contestants take turns, in an order that rotates; each figure is a median, beside its limit.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

import measure as m

MAIN = "import sys; sys.argv[0] = 'reparam'; from reparam.cli import main; main()"
IMPORTS = {name: ["-c", f"import {name}"] for name in ("torch", "reparam", "peft")}
IMPORTS["reparam.attach"] = ["-c", "import reparam; reparam.attach"]
VERBS = {
    "--help": ["--help"],
    "--version": ["--version"],
    "merge --help": ["merge", "--help"],
    "inspect --help": ["inspect", "--help"],
    "train --help": ["train", "--help"],
}
OTHERS = {"trl sft --help": ["-m", "trl.cli", "sft", "--help"]}


def seconds(arguments: list[str]) -> float:
    """CPU seconds of one interpreter and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    quick = m.setup(__doc__)
    commands = IMPORTS | {verb: ["-c", MAIN, *words] for verb, words in VERBS.items()}
    try:
        import trl  # noqa: F401
    except ImportError:
        pass
    else:
        commands |= OTHERS
    names = list(commands)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(2 if quick else 8):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(seconds(commands[name]))
    medians = {name: statistics.median(times[1:]) for name, times in found.items()}  # the first fills the file cache
    torch = medians["torch"]
    print("| CPU seconds | measured | over import torch | limit |\n|---|---|---|---|")
    for name, value in medians.items():
        over = name in ("merge --help", "inspect --help", "train --help", "reparam.attach")
        limit = "0.3 over torch" if over else "0.3" if name in ("--help", "--version") else ""
        print(f"| `{name}` | {value:.2f} | {value - torch:+.2f} | {limit} |")
    print("\npython benchmarks/import_time.py")


if __name__ == "__main__":
    main()
