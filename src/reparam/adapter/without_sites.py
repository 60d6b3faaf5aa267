"""What differs for a method that changes no weight: how it is put on a model, and how its files are read.

Each is a function that such a method, or its kind of adapter, registers its own version of:

    @put_on.register
    def _(method: MyMethod, model: nn.Module) -> MyAdapter: ...

`read_back` and `fill_from` serve every adapter; without a version of its own, one has the files of an adapter on sites.
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
    """Put a fresh adapter of a method that goes on no site on the model, selected. Its `model` is to be used then.

    Raises ValueError where the method registered no version.
    """
    raise ValueError(
        f"{method.name} changes no weight and does not say how it is put on a model; register that with "
        f"reparam.adapter.without_sites.put_on"
    )


@singledispatch
def read_back(adapter: Adapter, folder: Path, *, name: str) -> Adapter:
    """Put what this adapter saved in `folder` on its model once more, under another name, frozen and not selected."""
    return load(adapter.model, folder, name=name, activate=False)


@singledispatch
def fill_from(adapter: Adapter, folder: Path) -> None:
    """Take the values that this adapter saved in `folder`. Raises FormatError for a damaged file."""
    fill(adapter, files.read(folder), folder)
