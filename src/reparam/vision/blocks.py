"""The blocks of a transformer, and the hidden states that enter and leave them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of the blocks of a transformer of transformers. Raises ValueError if there is none."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(text, "num_hidden_layers", None)
    lists = [(path, part) for path, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    found = [pair for pair in lists if depth is None or len(pair[1]) == depth]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no list of {depth or 'any'} blocks (nn.ModuleList); use a decoder of "
            f"transformers"
        )
    return min(found, key=lambda pair: pair[0].count("."))


class States:
    """Hidden states of a forward pass: `states[0]` enters block 0, and `states[k]` leaves block k - 1.

    They are those of the blocks themselves, before any norm that follows the last one. Inside `recording()`, a forward
    pass fills `states`; only the indices that are asked for are kept.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.blocks = blocks
        self.found: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def recording(self, indices: set[int]) -> Iterator[None]:
        """Keep the states with these indices, 0 ... number of blocks."""
        self.found, held = {}, []
        for index in indices:
            if index:
                held.append(self.blocks[index - 1].register_forward_hook(self._leaves(index)))
            else:
                held.append(self.blocks[0].register_forward_pre_hook(self._enters, with_kwargs=True))
        try:
            yield
        finally:
            for handle in held:
                handle.remove()

    def _leaves(self, index: int) -> Any:
        def keep(block: nn.Module, args: Any, output: Any) -> None:
            self.found[index] = output if isinstance(output, Tensor) else output[0]

        return keep

    def _enters(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.found[0] = args[0] if args else kwargs["hidden_states"]
