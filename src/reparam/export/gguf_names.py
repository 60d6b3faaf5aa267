"""What GGUF calls the tensors of a model, and in which order it holds their rows.

The `gguf` package knows the names. For models of LLaMA's architecture the rows of the query and key maps are in another
order there, because llama.cpp rotates neighboring entries of a head, and transformers its two halves.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from reparam.errors import ExportError

ARCHITECTURES = {  # model type in transformers -> architecture in GGUF
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "starcoder2": "starcoder2",
}
INSTEAD = "write a merged model with reparam merge, and convert it with llama.cpp's convert_hf_to_gguf.py"
_ROTATED = re.compile(r"\.(?P<which>[qk])_proj$")


class Names:
    """Names and orders of the tensors of one model in GGUF.

    Raises ExportError if GGUF's order of rows is not known here for this architecture.
    """

    def __init__(self, config: Any) -> None:
        import gguf

        kind = str(config.model_type)
        if kind not in ARCHITECTURES:
            raise ExportError(
                f"models of the type {kind} are not supported for GGUF, only {', '.join(sorted(ARCHITECTURES))}; "
                f"{INSTEAD}"
            )
        self.architecture = ARCHITECTURES[kind]
        known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        self._map = gguf.get_tensor_name_map(known[self.architecture], config.num_hidden_layers)
        heads = config.num_attention_heads
        self._heads = {"q": heads, "k": getattr(config, "num_key_value_heads", None) or heads}

    def of(self, path: str) -> str:
        """The name of the module at this path, such as "blk.0.attn_q". Raises ExportError if GGUF has none."""
        name = self._map.get_name(path)
        if name is None:
            raise ExportError(f"{path}: GGUF has no name for this module in the architecture {self.architecture}")
        return str(name)

    def rows(self, path: str, tensor: Tensor) -> Tensor:
        """The rows of this module's weight, bias or B [O, ...] in GGUF's order."""
        match = _ROTATED.search(path)
        if self.architecture != "llama" or match is None:
            return tensor
        heads = self._heads[match["which"]]
        halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape).contiguous()
