"""One AdamW step (arXiv 1711.05101) on a range of elements, and the storage of their states in 32 or 8 bits.

    p <- p - lr · weight_decay · p
    m <- β₁ m + (1 - β₁) g            v <- β₂ v + (1 - β₂) g²
    p <- p - lr · (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + eps)

States consist of fields (m and v, or their codes and scales) in blocks of 256 elements. Shapes: N blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from reparam.optim.blockwise import BLOCK, codebook, dequantize, quantize
from reparam.optim.flat import Field


class States(Protocol):
    """How AdamW's first and second moments (m and v) are stored."""

    def read(self, fields: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Read m and v, float32 [N, 256] each, from the blocks' fields, [N, width] each."""

    def write(self, fields: list[Tensor], m: Tensor, v: Tensor) -> None:
        """Write back the m and v that `read` returned and a step changed, float32 of any shape."""


class Float32:
    """Moments in float32: 8 bytes per element, updated in place."""

    def read(self, fields: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the fields themselves, [N, 256] each."""
        return fields[0], fields[1]

    def write(self, fields: list[Tensor], m: Tensor, v: Tensor) -> None:
        """Do nothing: a step changes the fields in place."""


class Blockwise:
    """Moments in 8 bits: 2.03 bytes per element. Steps are computed in float32, and the new moments rounded."""

    def __init__(self, device: torch.device) -> None:
        self.signed, self.unsigned = codebook(signed=True, device=device), codebook(signed=False, device=device)

    def read(self, fields: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Dequantize m and v to new float32 tensors [N, 256]."""
        m, v, m_scale, v_scale = fields
        return dequantize(m, m_scale, self.signed), dequantize(v, v_scale, self.unsigned)

    def write(self, fields: list[Tensor], m: Tensor, v: Tensor) -> None:
        """Quantize m and v to the nearest levels and store the codes and scales."""
        new = *quantize(m.view(-1, BLOCK), self.signed), *quantize(v.view(-1, BLOCK), self.unsigned)
        for field, value in zip(fields, (new[0], new[2], new[1], new[3]), strict=True):
            field.copy_(value)


# The first two have the names and, with 32 bits, the contents of those in torch.optim.AdamW's state dict.
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
    """The storage for states of 32 or 8 bits; `device` holds the tables of 8-bit levels."""
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
    """One AdamW step in place on the parameter p and its moments m and v; g is the gradient. All float32, of one shape.

    `step` counts from 1. The operations and their order are those of `torch.optim.AdamW(foreach=False)`, so that on
    a CPU the results are bitwise equal, however the elements are divided into ranges.

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
    """A parameter's saved state after its dimension `dim` is cut to `index` [n]. 8-bit moments are requantized."""
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
