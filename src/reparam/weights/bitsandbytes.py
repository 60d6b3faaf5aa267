"""Read and write the tensors of an NF4 weight in a bitsandbytes 4-bit checkpoint, byte for byte.

| key | dtype, shape |
|---|---|
| `<p>.weight` | uint8 [⌈n/2⌉, 1], or the same bytes viewed as another dtype |
| `<p>.weight.absmax` | float32 [N], or uint8 [N] with double quantization ("nested") |
| `<p>.weight.quant_map` | float32 [16], the levels |
| `<p>.weight.nested_absmax` | float32 [M], nested only |
| `<p>.weight.nested_quant_map` | float32 [256], nested only |
| `<p>.weight.quant_state.bitsandbytes__nf4` | uint8: JSON with block sizes, dtype, shape and mean |

Reading and writing never quantize again. Tensors that bitsandbytes would misread or reject raise FormatError. The
bitsandbytes library is not required. Shapes: n = O · I entries, N = ⌈n/block⌉ blocks, M = ⌈N/256⌉.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from reparam.core.checks import listed
from reparam.core.plain import decode
from reparam.core.strict_json import loads
from reparam.errors import FormatError
from reparam.kernels.nf4_tables import BLOCKS, CODE, DYNAMIC, NESTED_BLOCK, Statistics
from reparam.weights.nf4 import NF4Weight

STATE, FP4 = "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"
PLAIN = ("weight", "weight.absmax", "weight.quant_map", STATE)
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
KEYS = (*PLAIN, *NESTED, FP4)
"""All keys that such a weight may have, without its path. FP4 is listed so that it is recognized and refused."""
# Dtypes that may hold the quantized bytes: FSDP shards only tensors of one common dtype.
_HOLDERS = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class _State:
    """The JSON of `quant_state`, with its keys in the order in which they are written."""

    quant_type: Literal["nf4"]
    blocksize: int
    dtype: Literal["bfloat16", "float16", "float32", "float64"]
    shape: tuple[int, int]
    nested_blocksize: int | None = None
    nested_dtype: Literal["float32"] | None = None
    nested_offset: float | None = None


def tensors_of_weight(weight: NF4Weight, path: str) -> dict[str, Tensor]:
    """The tensors of the module at `path` under the keys of the module's table. No two tensors share memory.

    >>> from reparam.weights.nf4 import NF4
    >>> state = tensors_of_weight(NF4(double=False).quantize(torch.ones(2, 64)), "a")
    >>> [(key, *tensor.shape) for key, tensor in state.items()][:3]
    [('a.weight', 64, 1), ('a.weight.absmax', 2), ('a.weight.quant_map', 16)]
    """
    stats, device = weight.statistics, weight.device
    state = {
        "quant_type": "nf4",
        "blocksize": weight.block,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    found = {
        "weight": weight.codes.detach().view(-1, 1),
        "weight.absmax": stats.absmax.detach(),
        "weight.quant_map": CODE.to(device, copy=True),
    }
    if stats.nested is not None and stats.offset is not None:
        table = DYNAMIC if stats.map is None else stats.map.detach()
        found |= {NESTED[0]: stats.nested.detach(), NESTED[1]: table.to(device, copy=True)}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": stats.offset.item()}
    found[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device=device)
    return {f"{path}.{key}": tensor for key, tensor in found.items()}


def weight_from(state: Mapping[str, Tensor], path: str) -> NF4Weight:
    """Build the weight of the module at `path`; the inverse of `tensors_of_weight`.

    The weight gets the dtype in `quant_state`. Keys outside `<path>.weight` are ignored. Raises FormatError, naming the
    path, if the weight is FP4, a tensor is missing or unknown, or a tensor has a wrong dtype, length or value.
    """
    start = f"{path}.weight"
    parts = {key[len(path) + 1 :]: value for key, value in state.items() if key == start or key.startswith(start + ".")}
    if FP4 in parts:
        raise FormatError(f"{start}: bitsandbytes FP4 is not supported, only NF4; quantize the original model instead")
    held = _json(parts.get(STATE), start)
    nested = held.nested_offset is not None
    wanted = (*PLAIN, *NESTED) if nested else PLAIN
    problems = [f"{path}.{key} is missing" for key in wanted if key not in parts]
    problems += [f"{path}.{key} is unknown" for key in parts if key not in wanted]
    problems = problems or _problems(parts, held)
    if problems:
        raise FormatError(f"{start}: not a complete bitsandbytes NF4 weight: {listed(problems)}")
    codes = parts["weight"].contiguous().view(torch.uint8).view(-1)
    stats = Statistics(parts["weight.absmax"])
    if nested:
        offset = torch.tensor([held.nested_offset], dtype=torch.float32, device=codes.device)
        stats = Statistics(parts["weight.absmax"], parts[NESTED[0]], offset, parts[NESTED[1]])
    return NF4Weight(codes, stats, held.blocksize, held.shape, getattr(torch, held.dtype))


def _json(tensor: Tensor | None, start: str) -> _State:
    """Decode the JSON in the tensor. Raises FormatError if a value is out of range."""
    if tensor is None:
        raise FormatError(f"{start}: quant_state.bitsandbytes__nf4 is missing; not a complete bitsandbytes NF4 weight")
    where = f"{start}.quant_state"
    if tensor.dtype is not torch.uint8 or tensor.ndim != 1:
        raise FormatError(f"{where}: expected a 1-D uint8 tensor, found {_kind(tensor)}")
    try:
        values = loads(bytes(tensor.tolist()).decode())
    except ValueError as error:
        raise FormatError(f"{where}: not valid UTF-8 JSON: {error}") from None
    held = decode(_State, values, where)
    problems = []
    if held.blocksize not in BLOCKS:
        problems.append(f"blocksize: expected one of {', '.join(map(str, BLOCKS))}, found {held.blocksize}")
    if min(held.shape) < 1:
        problems.append(f"shape: expected sizes of at least 1, found {held.shape[0]} x {held.shape[1]}")
    nested = held.nested_blocksize, held.nested_dtype, held.nested_offset
    if nested != (None, None, None) and None in nested:
        problems.append("expected all of nested_blocksize, nested_dtype and nested_offset, or none of them")
    if held.nested_blocksize not in (None, NESTED_BLOCK):
        problems.append(f"nested_blocksize: expected {NESTED_BLOCK}, found {held.nested_blocksize}")
    if abs(held.nested_offset or 0.0) > torch.finfo(torch.float32).max:
        problems.append(f"nested_offset: {held.nested_offset} does not fit into float32")
    if problems:
        raise FormatError(f"{where}: {listed(problems)}")
    return held


def _problems(parts: Mapping[str, Tensor], held: _State) -> list[str]:
    """Problems with the dtypes, shapes and values of the tensors, none of which is missing."""
    entries = held.shape[0] * held.shape[1]
    blocks = -(-entries // held.blocksize)
    nested = held.nested_offset is not None
    expected = {
        "weight.absmax": (torch.uint8 if nested else torch.float32, blocks),
        "weight.quant_map": (torch.float32, 16),
    }
    if nested:
        expected |= {NESTED[0]: (torch.float32, -(-blocks // NESTED_BLOCK)), NESTED[1]: (torch.float32, len(DYNAMIC))}
    quantized = parts["weight"]
    problems = [
        f"{key} is {_kind(parts[key])}, expected {str(dtype)[6:]} [{length}]"
        for key, (dtype, length) in expected.items()
        if parts[key].dtype is not dtype or list(parts[key].shape) != [length]
    ]
    if (
        quantized.dtype not in _HOLDERS
        or quantized.ndim != 2
        or quantized.shape[1] != 1
        or quantized.nbytes != (entries + 1) // 2
    ):
        problems.append(
            f"weight is {_kind(quantized)}, expected uint8 [{(entries + 1) // 2}, 1] for the {held.shape[0]} x "
            f"{held.shape[1]} entries of its quant_state"
        )
    if problems:
        return problems
    if not torch.equal(parts["weight.quant_map"], CODE.to(quantized.device)):
        problems.append("weight.quant_map does not hold the levels of NF4")
    floats = [key for key in expected if parts[key].dtype is torch.float32]
    problems += [f"{key} holds NaN or infinity" for key in floats if not torch.isfinite(parts[key]).all()]
    if nested and not (parts[NESTED[1]].diff() >= 0).all():
        problems.append(f"{NESTED[1]} is not sorted")
    return problems


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype)[6:]} {list(tensor.shape)}"
