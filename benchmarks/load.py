"""Measure memory and CPU time of loading a model into NF4, by reparam and bitsandbytes, and without quantization.

Each contestant loads a random bfloat16 Llama of about 1 GB, in shards, in a separate process. It loads a tiny model
first, so that importing libraries and compiling kernels do not count. Tensors that are not quantized, such as the
embeddings, are pages of a mapped file and count as resident once they are read; so every tensor is read once after
loading, as at its first use. "Peak" is the peak of resident memory, including pages of files, minus the resident memory
before loading (the kernel's high-water mark, which is reset first). The "anonymous" part, which does not belong to
files, is sampled every 2 ms.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

QUICK = "--quick" in sys.argv
CONTESTANTS = ("reparam", "bitsandbytes", "dense", "reparam, quantized folder")
GOAL, LIMIT, BYTES = 1.3, 1.0, 0.5159


def write(folder: Path, *, tiny: bool) -> None:
    """Write a random model to a folder, in shards."""
    sizes = (64, 128, 2, 256) if tiny else (2048, 5632, 9, 32000)
    hidden, inner, layers, vocabulary = sizes
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        vocab_size=vocabulary,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20kB" if tiny else "200MB")


def load(folder: Path, how: str) -> nn.Module:
    """Load the model in the folder as the contestant `how` does."""
    import reparam.hf.models

    settings: dict[str, Any] = {"dtype": torch.bfloat16}
    if how == "reparam":
        settings["quantization_config"] = reparam.NF4Config()
    elif how == "bitsandbytes":
        from transformers import BitsAndBytesConfig

        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def tensors(model: nn.Module) -> tuple[int, int]:
    """Bytes of all tensors of the model, and of those of its quantized matrices."""
    quantized = 0
    for module in model.modules():
        if type(module).__name__ == "NF4Weight":
            quantized += sum(p.nbytes for p in module.parameters())
        elif type(module).__name__ == "Linear4bit":
            quantized += sum(v.nbytes for k, v in module.state_dict().items() if k != "bias" and "map" not in k)
    plain = sum(
        p.nbytes for n, p in model.named_parameters() if type(p).__name__ != "Params4bit" and ".weight." not in n
    )
    return plain + quantized, quantized


def memory(process: str | int = "self") -> dict[str, int]:
    """Memory figures of a process in bytes by name: VmRSS, VmHWM, RssAnon and so on."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {
        key: int(rest.split()[0]) * 1024 for key, _, rest in (x.partition(":") for x in lines) if rest.endswith("kB")
    }


def child(folder: Path, small: Path, how: str) -> None:
    """Load the model in this process and print the figures as JSON."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    load(small, how)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, begin = memory(), resource.getrusage(resource.RUSAGE_SELF)
    print("begin", flush=True)
    model = load(folder, how)
    end = resource.getrusage(resource.RUSAGE_SELF)
    for tensor in model.parameters():
        tensor.detach().view(-1).view(torch.uint8)[::4096].sum()
    after = memory()
    total, quantized = tensors(model)
    matrices = sum(m.out_features * m.in_features for m in model.model.layers.modules() if hasattr(m, "in_features"))
    found = {
        "before": before["RssAnon"],
        "peak": after["VmHWM"] - before["VmRSS"],
        "after": after["VmRSS"] - before["VmRSS"],
        "seconds": end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime,
        "total": total,
        "quantized": quantized,
        "entries": matrices,
    }
    print("end", json.dumps(found), flush=True)


def measure(folder: Path, small: Path, how: str) -> dict[str, float]:
    """Measure one contestant in a new process."""
    command = [sys.executable, __file__, "--child", str(folder), str(small), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout))  # type: ignore[arg-type]
    reader.start()
    anonymous = 0
    while process.poll() is None:
        try:
            if lines:
                anonymous = max(anonymous, memory(process.pid).get("RssAnon", 0))
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.002)
    reader.join()
    assert process.wait() == 0, how
    found = json.loads(next(line for line in lines if line.startswith("end"))[3:])
    return {**found, "anonymous": anonymous - found["before"]}


def main() -> None:
    if "--child" in sys.argv:
        child(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, small = Path(temporary) / "model", Path(temporary) / "small"
        quantized, small_quantized = Path(temporary) / "quantized", Path(temporary) / "small_quantized"
        for target, tiny in ((small, True), (folder, QUICK)):
            write(target, tiny=tiny)
        for source, target in ((small, small_quantized), (folder, quantized)):
            load(source, "reparam").save_pretrained(target, max_shard_size="200MB")
        found = {
            how: measure(*((quantized, small_quantized) if "folder" in how else (folder, small)), how)
            for how in CONTESTANTS
        }
        on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        config = json.loads((folder / "config.json").read_text())
    largest = 2 * config["hidden_size"] * max(config["vocab_size"], config["intermediate_size"])
    size = found["reparam"]["total"]
    print(
        f"### Loading into NF4\n\nThe model is a Llama of {on_disk / 1e6:.0f} MB in bf16. Quantized, with head and "
        f"embeddings in bf16, it has {size / 1e6:.0f} MB; its largest tensor in bf16 has {largest / 1e6:.0f} MB. "
        f"Memory is relative to the quantized size:\n\n"
        "| loaded by | peak | limit | to reach | anonymous peak | resident at the end | bytes per parameter | CPU s |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for how, row in found.items():
        goal = GOAL + largest / size
        each = row["quantized"] / row["entries"] if row["quantized"] else 2.0
        missed = " (missed)" if how == "reparam" and row["peak"] / size > goal else ""
        cells = [
            how,
            f"{row['peak'] / size:.2f}{missed}",
            f"{LIMIT:.2f}",
            f"{goal:.2f}",
            f"{row['anonymous'] / size:.2f}",
        ]
        cells += [f"{row['after'] / size:.2f}", f"{each:.4f}", f"{row['seconds']:.1f}"]
        print("| " + " | ".join(cells) + " |")
    print(f"\nGoal for bytes per parameter: {BYTES}.\n\n    python benchmarks/load.py\n")


if __name__ == "__main__":
    main()
