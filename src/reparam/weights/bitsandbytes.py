"""The tensors of a bitsandbytes 4-bit checkpoint: `<p>.weight` and its companions, read and written byte for byte.

| key | dtype, shape |
|---|---|
| `<p>.weight` | uint8 [⌈n/2⌉, 1], or another dtype whose entries are the same bytes |
| `<p>.weight.absmax` | float32 [N], or uint8 [N] where it is doubly quantized ("nested") |
| `<p>.weight.quant_map` | float32 [16], the levels |
| `<p>.weight.nested_absmax` | float32 [M], nested only |
| `<p>.weight.nested_quant_map` | float32 [256], nested only |
| `<p>.weight.quant_state.bitsandbytes__nf4` | uint8: JSON with block sizes, dtype, shape and mean |

Nothing is quantized anew; what bitsandbytes would read as something else, or not at all, is refused. The library itself
is not needed. Shapes: n = O · I entries, N = ⌈n/block⌉ blocks, M = ⌈N/256⌉.
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
from reparam.errors import FormatError
from reparam.kernels.nf4_tables import BLOCKS, CODE, DYNAMIC, NESTED_BLOCK, Statistics
from reparam.weights.nf4 import NF4Weight

STATE, FP4 = "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"
PLAIN = ("weight", "weight.absmax", "weight.quant_map", STATE)
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
KEYS = (*PLAIN, *NESTED, FP4)
"""All keys that such a weight may have, without its path; the last one is refused by name."""
# Any of these may hold the quantized bytes: FSDP shards only tensors of the dtype that the others have.
_HOLDERS = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class _State:
    """The JSON, its keys in the order in which they are written."""

    quant_type: Literal["nf4"]
    blocksize: int
    dtype: Literal["bfloat16", "float16", "float32", "float64"]
    shape: tuple[int, int]
    nested_blocksize: int | None = None
    nested_dtype: Literal["float32"] | None = None
    nested_offset: float | None = None


def tensors_of_weight(weight: NF4Weight, path: str) -> dict[str, Tensor]:
    """The tensors of the module at `path`, under the keys above. No two of them share memory with each other.

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
    """The weight of the module at `path`; the inverse of `tensors_of_weight`.

    Keys that are not the weight's are not looked at. Its dtype is the one that the file says. Raises FormatError, with
    the path, for FP4, for tensors that are missing or unknown, and for whatever has a dtype, a length or values that
    the format does not have.
    """
    start = f"{path}.weight"
    parts = {key[len(path) + 1 :]: value for key, value in state.items() if key == start or key.startswith(start + ".")}
    if FP4 in parts:
        raise FormatError(f"{start}: is FP4 of bitsandbytes; only NF4 is read. Quantize the original model instead")
    held = _json(parts.get(STATE), start)
    nested = held.nested_offset is not None
    wanted = (*PLAIN, *NESTED) if nested else PLAIN
    problems = [f"{path}.{key} is missing" for key in wanted if key not in parts]
    problems += [f"{path}.{key} is not known" for key in parts if key not in wanted]
    problems = problems or _problems(parts, held)
    if problems:
        raise FormatError(f"{start}: not a whole NF4 weight of bitsandbytes: {listed(problems)}")
    codes = parts["weight"].contiguous().view(torch.uint8).view(-1)
    stats = Statistics(parts["weight.absmax"])
    if nested:
        offset = torch.tensor([held.nested_offset], dtype=torch.float32, device=codes.device)
        stats = Statistics(parts["weight.absmax"], parts[NESTED[0]], offset, parts[NESTED[1]])
    return NF4Weight(codes, stats, held.blocksize, held.shape, getattr(torch, held.dtype))


def _json(tensor: Tensor | None, start: str) -> _State:
    """The JSON in the tensor, its values within their ranges."""
    if tensor is None:
        raise FormatError(
            f"{start}: has no quant_state.bitsandbytes__nf4, so it is not NF4 of bitsandbytes, or cut short"
        )
    where = f"{start}.quant_state"
    if tensor.dtype is not torch.uint8 or tensor.ndim != 1:
        raise FormatError(f"{where}: expected a row of uint8, found {_kind(tensor)}")
    try:
        values = json.loads(bytes(tensor.tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not JSON in UTF-8: {error}") from None
    held = decode(_State, values, where)
    problems = []
    if held.blocksize not in BLOCKS:
        problems.append(f"blocksize: expected one of {', '.join(map(str, BLOCKS))}, found {held.blocksize}")
    if min(held.shape) < 1:
        problems.append(f"shape: no matrix has {held.shape[0]} x {held.shape[1]} entries")
    nested = held.nested_blocksize, held.nested_dtype, held.nested_offset
    if nested != (None, None, None) and None in nested:
        problems.append("nested_blocksize, nested_dtype and nested_offset go together")
    if held.nested_blocksize not in (None, NESTED_BLOCK):
        problems.append(f"nested_blocksize: expected {NESTED_BLOCK}, found {held.nested_blocksize}")
    if abs(held.nested_offset or 0.0) > torch.finfo(torch.float32).max:
        problems.append(f"nested_offset: {held.nested_offset} is no float32")
    if problems:
        raise FormatError(f"{where}: {listed(problems)}")
    return held


def _problems(parts: Mapping[str, Tensor], held: _State) -> list[str]:
    """What does not fit, in tensors that are all there."""
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
            f"weight is {_kind(quantized)}, and the {held.shape[0]} x {held.shape[1]} entries of its quant_state take "
            f"uint8 [{(entries + 1) // 2}, 1]"
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
