"""Checks of the settings and parameters of PagedAdamW."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reparam.core.checks import finite, whole
from reparam.optim.adamw import FIELDS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_and_shape(tensor: Tensor) -> str:
    """Dtype and shape of a tensor, for messages: "float32 [2, 3]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_pages(bits: int, budget: int | None, page: int, folder: str | os.PathLike[str] | None) -> None:
    """Raise ValueError, listing all problems, if the settings of pages are invalid."""
    if not whole(bits, 0) or bits not in FIELDS:
        raise ValueError(f"bits={bits!r}: expected 32 or 8")
    block = sum(field.block_bytes for field in FIELDS[bits])
    problems = [
        f"{name}={value!r}: expected a whole number of bytes"
        for name, value in (("page", page), ("budget", budget))
        if not (whole(value, 0) or (value is None and name == "budget"))
    ]
    if not isinstance(folder, str | os.PathLike | None):
        problems.append(f"folder={folder!r}: expected a path")
    if problems:
        raise ValueError("; ".join(problems))
    if page < block:
        problems.append(f"page={page!r} bytes: expected at least {block}, the states of 256 elements at {bits} bits")
    elif budget is not None and budget < page // block * block:
        problems.append(
            f"budget={budget!r} bytes is less than one page ({page // block * block} bytes): raise budget or lower page"
        )
    if folder is not None and not Path(folder).is_dir():
        problems.append(f"folder {os.fspath(folder)!r} does not exist")
    if problems:
        raise ValueError("; ".join(problems))


def _number(value: Any) -> Any:
    """The number in a tensor of one element, as torch's optimizers allow; other values unchanged."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError, listing all problems, if a parameter group is invalid."""
    problems = [
        f"{name}={group[name]!r}: expected at least 0"
        for name in ("lr", "eps", "weight_decay")
        if not (finite(value := _number(group[name])) and value >= 0)
    ]
    betas = group["betas"]
    pair = isinstance(betas, tuple | list) and len(betas) == 2
    if not pair or not all(finite(beta := _number(one)) and 0 <= beta < 1 for one in betas):
        problems.append(f"betas={group['betas']!r}: expected two numbers from 0 to below 1")
    problems += [f"{name} is not supported: set it to False" for name in ("amsgrad", "maximize") if group.get(name)]
    for parameter in group["params"]:
        if parameter.dtype not in _DTYPES or not parameter.is_contiguous():
            kind = dtype_and_shape(parameter) + ("" if parameter.is_contiguous() else ", not contiguous")
            problems.append(
                f"a parameter is {kind}: expected contiguous float32, bfloat16 or float16; or use torch.optim.AdamW"
            )
    if problems:
        raise ValueError("; ".join(problems))
