"""Write an adapter as the plain LoRA that vLLM serves, in PEFT's format.

vLLM takes LoRA of linear maps at the ranks below, with one rank for all maps and the scale alpha / r. It refuses DoRA,
trained biases and modules that train whole (`vllm/lora/peft_helper.py`, 0.32). So each scale is multiplied into B, and
lower ranks are filled up with zeros; then alpha = r.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from reparam.adapter.adapter import Adapter
from reparam.export import vllm_experts
from reparam.export.changes import Change
from reparam.io import files
from reparam.io.record import Record
from reparam.methods.lora import LoRA

PROGRAM = "vLLM"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def write(folder: Path, adapter: Adapter, changes: Mapping[str, Change], rank: int) -> None:
    """Write PEFT's two files, with factors of this rank for each map, in float32."""
    whole = adapter.record()
    vllm_experts.check(adapter.model, [change.site for change in changes.values() if change.site.kind == "expert"])
    tensors, sites = {}, {}
    for change in changes.values():
        own = {change.site: change.at(rank)}
        if change.site.kind == "expert":
            own = vllm_experts.apart(whole.model_type, change.site, change.at(rank))
        for site, factors in own.items():
            sites[site.name] = site
            tensors[f"{site.name}.A"], tensors[f"{site.name}.B"] = factors.A.float(), factors.B.float()
    record = Record(
        LoRA(r=rank, alpha=float(rank)),
        sites,
        tensors,
        base=whole.base,
        modules=whole.modules,
        prompt_format=whole.prompt_format,
    )
    files.write(folder, record, format="peft")


def next_step(folder: Path, base: str, rank: int) -> str:
    """The command that serves it."""
    return f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules NAME={folder}"
