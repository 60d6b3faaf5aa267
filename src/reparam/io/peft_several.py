"""Adapters of several methods in PEFT's files: one method that PEFT has, and biases of modules beside its sites.

PEFT saves such biases with `bias="all"`, under the names that they have in the model. Reading finds them in `beside` of
the record, because only the model tells what their modules are (`adapter/fitted.py`).
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
from reparam.io.peft_formats import PeftFormat, peft_format, writer_of
from reparam.io.record import Record
from reparam.methods.several import Several


@peft_format(Several)
class SeveralFormat(PeftFormat[Several]):
    """PEFT's file format of a method with biases of other modules."""

    peft_type = ""

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Never: the format of the method that has factors reads such a folder."""
        return False

    def check(self, method: Several, record: Record) -> None:
        """Raise FormatError if PEFT cannot express the adapter."""
        main, rest = _main(method, record)
        writer_of(main).check(main, _only(record, main, rest))

    def settings(self, method: Several, record: Record) -> dict[str, Any]:
        """The settings of the method with factors, and `bias="all"`."""
        main, rest = _main(method, record)
        return writer_of(main).settings(main, _only(record, main, rest)) | {"bias": "all"}

    def tensors(self, name: str, site: Site, record: Record) -> dict[str, Tensor]:
        """The tensors of one site, by the ends of their keys; none for a site whose bias alone trains."""
        own = record.method.of(name)  # type: ignore[attr-defined]
        return {} if own is None else writer_of(own).tensors(name, site, record)


def _main(method: Several, record: Record) -> tuple[Method, set[str]]:
    """The one method with factors, and its sites. Raises FormatError for several."""
    found: dict[str, Method] = {name: own for name in record.sites if (own := method.of(name)) is not None}
    different = list({repr(own): own for own in found.values()}.values())
    if len(different) != 1:
        raise FormatError(
            f"PEFT has no equivalent of an adapter of several methods ({listed([one.name for one in different])}); "
            f"save with format='reparam'"
        )
    return different[0], set(found)


def _only(record: Record, main: Method, names: set[str]) -> Record:
    """The record with these sites only."""
    return dataclasses.replace(record, method=main, sites={n: s for n, s in record.sites.items() if n in names})
