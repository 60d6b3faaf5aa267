"""Write an adapter as a LoRA in GGUF, which llama.cpp applies to a model in GGUF: one file, `adapter.gguf`.

For each map it has `<name>.weight.lora_a` [R, I] and `<name>.weight.lora_b` [O, R]. llama.cpp multiplies their product
by alpha / R with the R of each map, so the ranks of the maps may differ; B is written times R / alpha here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from reparam.adapter.adapter import Adapter
from reparam.errors import ExportError
from reparam.export.changes import Change
from reparam.export.gguf_names import Names
from reparam.io.staged import staged_folder

PROGRAM = "llama.cpp"
FILE = "adapter.gguf"


def write(folder: Path, adapter: Adapter, changes: Mapping[str, Change], rank: int) -> None:
    """Write `adapter.gguf` in float32, with this rank or a map's own lower one.

    Raises ExportError if GGUF has no tensor for one of the modules.
    """
    import gguf

    config = adapter.model.config
    names = Names(config)
    if getattr(config, "tie_word_embeddings", False) and "lm_head" in changes:
        raise ExportError(
            "lm_head: shares its weight with the embedding, and GGUF has no tensor of its own for it then; pass "
            "--merged to write a merged model"
        )
    tensors: dict[str, Tensor] = {}
    for path, change in changes.items():
        own = min(rank, change.rank)
        factors = change.at(own)
        name = names.of(path)
        tensors[f"{name}.weight.lora_a"] = factors.A.float()
        tensors[f"{name}.weight.lora_b"] = names.rows(path, factors.B.float() * (own / rank))
    with staged_folder(folder, owned=True) as staging:
        writer = gguf.GGUFWriter(staging / FILE, names.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        for key, tensor in tensors.items():
            writer.add_tensor(key, tensor.contiguous().cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def next_step(folder: Path, base: str, rank: int) -> str:
    """The command that uses it."""
    return f"llama-cli --model BASE.gguf --lora {folder / FILE}"
