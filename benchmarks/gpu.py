"""Check and time NF4 and QLoRA on a GPU, and run a training step of a 65B-shaped model in 48 GB.

    python benchmarks/gpu.py             print the table; without a GPU, print "not run: no GPU"
    python benchmarks/gpu.py --write     also write docs/gpu-results.md
    python benchmarks/gpu.py --quick     tiny shapes, also on a CPU, to check that it runs; its numbers mean nothing

First, every kernel is compared with its torch reference on fresh random inputs: quantized codes and dequantized values
must be equal bit for bit, and products equal up to rounding. Kernel times are measured on the device, which is kept
busy until all calls are queued, so that launch overhead does not count. Contestants take turns; a ratio is the median
of the ratios within rounds. Memory is the peak of torch's allocator beyond what was held before; it includes reparam's
paged optimizer states but not bitsandbytes'.
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
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds; also runs on a CPU")
    parser.add_argument("--write", action="store_true", help=f"write docs/{RESULTS.name}, if a GPU is found")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quick = arguments.quick
    if device.type == "cpu" and not quick:
        print("not run: no GPU")
        return
    import gpu_work as work  # imported here, because its dependencies need not be installed without a GPU

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
    print(("Tiny shapes, to check that it runs; the numbers mean nothing.\n\n" if quick else "") + table)
    if arguments.write and device.type == "cuda" and not quick:
        title = f"# On a GPU\n\n`python benchmarks/gpu.py --write` on {datetime.date.today()}: {versions(device)}.\n\n"
        RESULTS.write_text(title + table)


if __name__ == "__main__":
    main()
