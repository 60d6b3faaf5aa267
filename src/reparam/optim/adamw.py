"""One AdamW step (arXiv 1711.05101) on a stretch of elements, apart from how their states are held.

    p <- p - lr · weight_decay · p
    m <- β₁ m + (1 - β₁) g            v <- β₂ v + (1 - β₂) g²
    p <- p - lr · (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + eps)

States are fields (m and v, or their codes and scales) in blocks of 256 elements. Shapes: N blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from reparam.optim.blockwise import BLOCK, codebook, dequantize, quantize
from reparam.optim.flat import Field


class States(Protocol):
    """How the means and mean squares of the gradients are held."""

    def read(self, fields: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and mean square, float32 [N, 256] each, from the blocks' fields, [N, width] each."""

    def write(self, fields: list[Tensor], m: Tensor, v: Tensor) -> None:
        """Put back what `read` gave and a step changed, in any shape."""


class Float32:
    """As they are: 8 bytes per element, changed in place."""

    def read(self, fields: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The fields themselves."""
        return fields[0], fields[1]

    def write(self, fields: list[Tensor], m: Tensor, v: Tensor) -> None:
        """Nothing: they are there."""


class Blockwise:
    """In 8 bits, 2.03 bytes per element; each step is computed in float32 and rounded after the parameter's update."""

    def __init__(self, device: torch.device) -> None:
        self.signed, self.unsigned = codebook(signed=True, device=device), codebook(signed=False, device=device)

    def read(self, fields: list[Tensor]) -> tuple[Tensor, Tensor]:
        """New tensors."""
        m, v, m_scale, v_scale = fields
        return dequantize(m, m_scale, self.signed), dequantize(v, v_scale, self.unsigned)

    def write(self, fields: list[Tensor], m: Tensor, v: Tensor) -> None:
        """Round to the nearest levels."""
        new = *quantize(m.view(-1, BLOCK), self.signed), *quantize(v.view(-1, BLOCK), self.unsigned)
        for field, value in zip(fields, (new[0], new[2], new[1], new[3]), strict=True):
            field.copy_(value)


# The names of the first two, and at 32 bits their contents, are those of torch.optim.AdamW's state dict.
FIELDS = {
    32: (Field("exp_avg", torch.float32, BLOCK), Field("exp_avg_sq", torch.float32, BLOCK)),
    8: (
        Field("exp_avg", torch.uint8, BLOCK),
        Field("exp_avg_sq", torch.uint8, BLOCK),
        Field("exp_avg_scale", torch.float32, 1),
        Field("exp_avg_sq_scale", torch.float32, 1),
    ),
}


def make_states(bits: int, device: torch.device) -> States:
    """The states of this many bits, on a device."""
    return Float32() if bits == 32 else Blockwise(device)


def adamw_(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step on float32 tensors of one shape: parameter, gradient, mean, mean square; all but the gradient change.

    `step` counts from 1. The operations and their order are those of `torch.optim.AdamW(foreach=False)`, so that on
    a CPU the bits are the same too, however the elements are cut into stretches.

    >>> p, g, m, v = torch.ones(1), torch.ones(1), torch.zeros(1), torch.zeros(1)
    >>> adamw_(p, g, m, v, step=1, lr=0.25, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    >>> p, m
    (tensor([0.7500]), tensor([0.1000]))
    """
    beta1, beta2 = betas
    if weight_decay != 0:
        p.mul_(1 - lr * weight_decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    p.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))


def narrowed(state: Mapping[str, Tensor], dim: int, index: Tensor, *, bits: int) -> dict[str, Tensor]:
    """A parameter's saved state when only `index` [N] of its dimension `dim` is left; 8 bits are rounded anew."""
    index = index.cpu()
    if bits == 32:
        return {key: value.index_select(dim, index) if value.ndim else value for key, value in state.items()}
    found = {"step": state["step"]}
    for name in ("exp_avg", "exp_avg_sq"):
        codes, scales = state[name], state[f"{name}_scale"]
        book = codebook(signed=name == "exp_avg")
        rest = len(scales) * BLOCK - codes.numel()
        blocks = nn.functional.pad(codes.flatten(), (0, rest)).view(-1, BLOCK)
        values = dequantize(blocks, scales[:, None], book).flatten()[: codes.numel()].view(codes.shape)
        left = values.index_select(dim, index)
        padded = nn.functional.pad(left.flatten(), (0, -left.numel() % BLOCK)).view(-1, BLOCK)
        new, new_scales = quantize(padded, book)
        found[name] = new.flatten()[: left.numel()].view(left.shape)
        found[f"{name}_scale"] = new_scales.flatten()
    return found
