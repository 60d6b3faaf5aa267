"""Adapters of several methods in PEFT's files: one method that PEFT has, with biases and tokens of other modules.

PEFT saves such biases with `bias="all"`, under the names that they have in the model, and the rows of tokens with
`trainable_token_indices`. Reading puts both into `beside` of the record, because only the model tells what their
modules are (`adapter/fitted.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from reparam.core.base import Site
from reparam.core.checks import listed
from reparam.core.method import Method
from reparam.errors import FormatError
from reparam.io.peft_factors import TOKENS
from reparam.io.peft_formats import PeftFormat, peft_format, writer_of
from reparam.io.record import Record
from reparam.methods.several import Several
from reparam.methods.tokens import Tokens


@peft_format(Several)
class SeveralFormat(PeftFormat[Several]):
    """PEFT's file format of a method with biases and tokens of other modules."""

    peft_type = ""

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Never: the format of the method that has factors reads such a folder."""
        return False

    def check(self, method: Several, record: Record) -> None:
        """Raise FormatError if PEFT cannot express the adapter."""
        parts = _Parts.of(method, record)
        writer_of(parts.main).check(parts.main, parts.record)

    def settings(self, method: Several, record: Record) -> dict[str, Any]:
        """The settings of the method with factors, `bias="all"`, and the tokens by module."""
        parts = _Parts.of(method, record)
        found = writer_of(parts.main).settings(parts.main, parts.record)
        if parts.biased:
            found["bias"] = "all"
        if parts.tokens:
            found["trainable_token_indices"] = {name: list(own.ids) for name, own in parts.tokens.items()}
        return found

    def tensors(self, name: str, site: Site, record: Record) -> dict[str, Tensor]:
        """The tensors of one site, by the ends of their keys; none for a site whose bias alone trains."""
        own = record.method.of(name)  # type: ignore[attr-defined]
        if name in record.tied or own is None:
            return {}
        if own.name == Tokens.name:
            return {TOKENS: record.tensors[f"{name}.values"]}
        return writer_of(own).tensors(name, site, record)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What PEFT's settings tell apart in one adapter."""

    main: Method
    record: Record
    """The sites of the main method."""
    tokens: dict[str, Tokens]
    biased: bool
    """Whether the bias alone trains at some site."""

    @classmethod
    def of(cls, method: Several, record: Record) -> _Parts:
        """Raises FormatError unless one method has factors."""
        found = {name: method.of(name) for name in record.sites if name not in record.tied}
        tokens = {name: own for name, own in found.items() if own is not None and own.name == Tokens.name}
        mains = {name: own for name, own in found.items() if own is not None and name not in tokens}
        different = list({repr(own): own for own in mains.values()}.values())
        if len(different) != 1:
            raise FormatError(
                f"PEFT has no equivalent of an adapter of several methods ({listed([one.name for one in different])}); "
                f"save with format='reparam'"
            )
        sites = {name: site for name, site in record.sites.items() if name in mains}
        tied = {name: tie for name, tie in record.tied.items() if tie.to in mains}
        rest = dataclasses.replace(record, method=different[0], sites=sites, tied=tied)
        return cls(different[0], rest, tokens, None in found.values())  # type: ignore[arg-type]
