"""Rows of single tokens in PEFT's files of its own method TRAINABLE_TOKENS.

The keys are `base_model.model.<path>.trainable_tokens_delta` [n, I]; despite the name, the tensor holds the rows. Where
the base ties the output head to the embedding, PEFT writes the rows under both names. Only the model tells whether a
path is an embedding or a linear map, and what is tied: `adapter/fitted.py` decides both.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from reparam.core.base import Site
from reparam.errors import FormatError
from reparam.io.peft_config import parse
from reparam.io.peft_factors import Contents, targets_of
from reparam.io.peft_formats import PREFIX, Folder, PeftFormat, peft_format
from reparam.io.record import Record
from reparam.methods.tokens import Tokens

ROWS = ".trainable_tokens_delta"
_IDS = "token_indices"


@peft_format(Tokens)
class TokensFormat(PeftFormat[Tokens]):
    """PEFT's file format of trained tokens."""

    peft_type = "TRAINABLE_TOKENS"
    ties = True

    def read(self, folder: Folder) -> Record:
        """Read the rows and the ids of their tokens."""
        settings = {key: value for key, value in folder.settings.items() if key not in ("init_weights", _IDS)}
        config = parse({**settings, "trainable_token_indices": folder.settings.get(_IDS)}, folder.config)
        try:
            method = Tokens(ids=tuple(config.tokens("")))
        except ValueError as error:
            raise FormatError(f"{folder.config}: {_IDS}: {error}") from None
        beside: dict[str, Tensor] = {}
        frozen: dict[str, Tensor] = {}
        problems = []
        for key, tensor in folder.tensors().items():
            path = key.removeprefix(PREFIX)
            if not key.startswith(PREFIX) or ".lora_" in path:
                problems.append(f"unknown tensor {key}")
            elif path.endswith(ROWS):
                beside[f"{path.removesuffix(ROWS)}.values"] = tensor
            else:  # PEFT's save_embedding_layers: a copy of the base's own matrix
                frozen[path.replace(".base_layer.", ".")] = tensor
        if not beside:
            problems.append(f"no tensor ends with {ROWS}")
        parts = {key.removesuffix(".values"): {"method": method.name, **method.settings()} for key in beside}
        found = Contents({}, {}, frozen, beside, parts, [], problems)
        found.check(folder.weights)
        return found.record(method, {}, {}, config)

    def settings(self, method: Tokens, record: Record) -> dict[str, Any]:
        """The contents of `adapter_config.json`. PEFT itself finds what is tied to the embedding."""
        leaders = {name: site for name, site in record.sites.items() if name not in record.tied}
        return {
            "peft_type": self.peft_type,
            "task_type": None,
            "base_model_name_or_path": record.base.source if record.base else None,
            "token_indices": list(method.ids),
            "target_modules": targets_of(dataclasses.replace(record, sites=leaders)),
            "inference_mode": True,
        }

    def check(self, method: Tokens, record: Record) -> None:
        """Raise FormatError if the adapter also trains biases or whole modules, which PEFT's method cannot."""
        super().check(method, record)
        if record.replaced or any(f"{name}.bias" in record.tensors for name in record.sites):
            raise FormatError(
                "PEFT's TRAINABLE_TOKENS trains neither biases nor whole modules beside the tokens; save with "
                "format='reparam'"
            )

    def tensors(self, name: str, site: Site, record: Record) -> dict[str, Tensor]:
        """The rows of one site."""
        return {ROWS: record.tensors[f"{name}.values"]}
