"""Read and write the tensors of an int8 weight: `<p>.weight` int8 [O, I] and `<p>.weight.absmax` float32 [O].

    ŵ = weight · (absmax / 127), row by row

The layout differs from that of LLM.int8, which uses the key `<p>.SCB`. Shapes: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reparam.core.checks import listed
from reparam.errors import FormatError
from reparam.weights.int8 import Int8Weight
from reparam.weights.quantized import floats

KEYS = ("weight", "weight.absmax")
"""All keys of an int8 weight, without its path."""


def tensors_of_weight(weight: Int8Weight, path: str) -> dict[str, Tensor]:
    """The tensors of the module at `path`, under the keys of the module's docstring.

    >>> from reparam.weights.int8 import Int8
    >>> tensors_of_weight(Int8().quantize(torch.tensor([[1.0, -0.5]])), "a")
    {'a.weight': tensor([[127, -64]], dtype=torch.int8), 'a.weight.absmax': tensor([1.])}
    """
    return {f"{path}.weight": weight.codes.detach(), f"{path}.weight.absmax": floats(weight.absmax.detach())}


def weight_from(state: Mapping[str, Tensor], path: str) -> Int8Weight:
    """Build the weight of the module at `path`; the inverse of `tensors_of_weight`.

    The weight gets the dtype float32, because the tensors do not store the original one. Raises FormatError, naming the
    path, if a tensor is missing or unknown, or has a wrong dtype, shape or value.
    """
    start = f"{path}.weight"
    parts = {key[len(path) + 1 :]: value for key, value in state.items() if key == start or key.startswith(start + ".")}
    problems = [f"{path}.{key} is missing" for key in KEYS if key not in parts]
    problems += [f"{path}.{key} is unknown" for key in parts if key not in KEYS]
    if not problems:
        codes, absmax = parts["weight"], parts["weight.absmax"]
        if codes.dtype is not torch.int8 or codes.ndim != 2 or not codes.numel():
            problems.append(f"weight is {str(codes.dtype)[6:]} {list(codes.shape)}, expected a 2-D int8 tensor")
        elif absmax.dtype is not torch.float32 or list(absmax.shape) != [len(codes)]:
            problems.append(
                f"weight.absmax is {str(absmax.dtype)[6:]} {list(absmax.shape)}, expected float32 [{len(codes)}]"
            )
        elif not torch.isfinite(absmax).all():
            problems.append("weight.absmax holds NaN or infinity")
    if problems:
        raise FormatError(f"{start}: not a complete int8 weight: {listed(problems)}")
    return Int8Weight(codes, absmax, torch.float32)
