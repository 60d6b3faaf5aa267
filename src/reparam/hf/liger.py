"""The loss with the fused kernel of Liger (`pip install liger-kernel`), where it can take the place of chunks.

The kernel computes the output head and the cross entropy together, a few tokens at a time, as `ChunkedLoss` does.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from reparam.errors import NotChunked
from reparam.hf.chunked import ChunkedLoss, Tail

IGNORED = -100  # no token that reaches the kernel has this label


class LigerLoss(ChunkedLoss):
    """`ChunkedLoss` of which forward passes with gradients use Liger's kernel.

    Raises NotChunked, beside what `ChunkedLoss` raises it for, if Liger is not installed, if the head is not a plain
    `nn.Linear` (as an adapted or quantized one is not), and if the model changes its logits by a factor or a softcap.
    """

    def __init__(self, model: nn.Module, *, smoothing: float = 0.0) -> None:
        if importlib.util.find_spec("liger_kernel") is None:
            raise NotChunked("Liger is not installed: pip install liger-kernel")
        super().__init__(model, smoothing=smoothing)
        if type(self.head) is not nn.Linear:
            raise NotChunked("Liger's kernel reads the weight of a plain nn.Linear, and the output head is not one")
        if self.tail != Tail():
            raise NotChunked("the model changes its logits after the output head, for which the kernel is not used")

    def _summed(self, hidden: Tensor, wanted: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
        if not torch.is_grad_enabled() or not len(hidden):
            return super()._summed(hidden, wanted, places, shape)
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        head: Any = self.head
        found: Tensor = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, head.weight, wanted, head.bias, None, IGNORED, 0.0, self.smoothing, "sum"
        )[0]
        return found


def chosen(model: nn.Module, *, smoothing: float, wish: bool | None) -> ChunkedLoss | None:
    """The loss with Liger's kernel, or None if it is not wished or, without a wish, cannot be used.

    Raises NotChunked if it is wished (`wish` is true) and cannot be used.
    """
    if wish is False:
        return None
    try:
        if next(model.parameters()).device.type != "cuda":
            raise NotChunked("Liger's kernels need an NVIDIA or AMD GPU")
        return LigerLoss(model, smoothing=smoothing)
    except NotChunked:
        if wish:
            raise
        return None
