"""Attach and load adapters of methods that change no weights, such as prompt tuning.

The functions below dispatch on the type of their first argument. A method or its adapter class registers its own
version:

    @put_on.register
    def _(method: MyMethod, model: nn.Module) -> MyAdapter: ...

`read_back` and `fill_from` work for every adapter. Their default versions read the files of an adapter with sites.
"""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path

from torch import nn

from reparam.adapter.adapter import Adapter
from reparam.adapter.load import fill, load
from reparam.core.method import Method
from reparam.io import files


@singledispatch
def put_on(method: Method, model: nn.Module) -> Adapter:
    """Put a new adapter of a method without sites on the model and select it. Use the adapter's `model` from then on.

    Raises ValueError if the method registered no version.
    """
    raise ValueError(
        f"{method.name} changes no weights and has no function that puts it on a model; register one with "
        f"reparam.adapter.without_sites.put_on"
    )


@singledispatch
def read_back(adapter: Adapter, folder: Path, *, name: str) -> Adapter:
    """Load the copy of this adapter saved in `folder` onto the same model as `name`, frozen and not selected."""
    return load(adapter.model, folder, name=name, activate=False)


@singledispatch
def fill_from(adapter: Adapter, folder: Path) -> None:
    """Set the adapter's tensors to the values saved in `folder`. Raises FormatError if a file is damaged."""
    fill(adapter, files.read(folder), folder)
