"""NF4 and QLoRA on a GPU: kernels against their references, then times, then a step of a 65B-shaped model in 48 GB.

    python benchmarks/gpu.py             the table; "not run: no GPU" where there is none
    python benchmarks/gpu.py --write     also into docs/gpu-results.md
    python benchmarks/gpu.py --quick     tiny shapes, on a CPU too, to see that it runs; the numbers mean nothing

Every kernel must first equal its torch reference on fresh random inputs: bytes and bits for quantizing and
dequantizing, rounding for products. Kernel times are the device's own: it is kept busy until all calls are queued, so
that launching them is not counted. Contestants take turns, and a ratio is the median of the ratios within the rounds.
Memory is the peak of torch's allocator beyond what was there before; bitsandbytes' paged states are not in it, ours
are.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import warnings
from pathlib import Path

import torch

RESULTS = Path(__file__).parent.parent / "docs" / "gpu-results.md"
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes")


def versions(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return ", ".join([name, *(f"{package} {found.get(package, '(none)')}" for package in PACKAGES)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds, on a CPU too")
    parser.add_argument("--write", action="store_true", help=f"write docs/{RESULTS.name}, if a GPU is found")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quick = arguments.quick
    if device.type == "cpu" and not quick:
        print("not run: no GPU")
        return
    import gpu_work as work  # not above: where there is no GPU, what it is compared with need not be installed

    warnings.filterwarnings("ignore")
    print(f"{versions(device)}; seed {torch.seed()}\n")
    print(work.check(device, quick=quick), "\n")
    lines = [
        line
        for part in (work.bandwidth, work.decoding, work.training, work.largest)
        for line in part(device, quick=quick)
    ]
    table = "| measured | reparam | PEFT, bitsandbytes | dense bfloat16 | to reach |\n|---|---|---|---|---|\n"
    table += "".join("| " + " | ".join(line) + " |\n" for line in lines)
    print(("Tiny shapes, to see that it runs; the numbers mean nothing.\n\n" if quick else "") + table)
    if arguments.write and device.type == "cuda" and not quick:
        title = f"# On a GPU\n\n`python benchmarks/gpu.py --write` on {datetime.date.today()}: {versions(device)}.\n\n"
        RESULTS.write_text(title + table)


if __name__ == "__main__":
    main()
