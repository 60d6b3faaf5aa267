"""CPU seconds, user and system, of a fresh interpreter that imports a package, over one that imports torch alone."""

from __future__ import annotations

import resource
import subprocess
import sys

import measure as m


def importing(package: str) -> float:
    """CPU seconds of one interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import {package}"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    quick = m.setup(__doc__)
    packages = ("torch", "reparam", "peft")
    seconds: dict[str, list[float]] = {package: [] for package in packages}
    for turn in range(2 if quick else 12):
        for package in packages[turn % 3 :] + packages[: turn % 3]:
            seconds[package].append(importing(package))
    times = m.Times({package: found[1:] for package, found in seconds.items()})  # the first fills the file cache
    row = m.Row("import, over import torch", times.over("reparam", "torch"), times.over("peft", "torch"), 1.0, 1.1)
    m.show("Import", [row], "python benchmarks/import_time.py")
    print(f"CPU seconds of import torch: {times.median('torch'):.2f}\n")


if __name__ == "__main__":
    main()
