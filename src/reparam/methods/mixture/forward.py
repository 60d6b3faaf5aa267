"""The inputs of one forward pass that the sites of a mixture need, and the gates and losses that they have computed.

Shapes: B rows of a batch, L tokens of a row, N experts, H width of the hidden states. In packs (see `packs.py`), what
is said of rows holds for the S sequences that are in them, end to end.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from reparam.methods.mixture.packs import Packs
from reparam.methods.mixture.select import Gating


@dataclasses.dataclass(frozen=True)
class Given:
    """Values from `reparam.context` for the next forward passes; None for those that are not set."""

    tasks: Tensor | None = None  # [] or [B] int64
    mask: Tensor | None = None  # [B, L] bool, True for tokens that are not padding
    prompt: Tensor | None = None  # [] or [B] int64, number of prompt tokens of a row, without padding
    experts: Tensor | None = None  # [N] bool, the experts that may be used
    accumulation: int = 1  # forward passes per optimizer step


@dataclasses.dataclass(eq=False)
class Forward:
    """The inputs of one forward pass that sites need, and the gates and losses that they have computed so far."""

    rows: int | None = None  # B
    tokens: int | None = None  # L
    tasks: Tensor | None = None  # as in `Given`, like mask, prompt and experts
    mask: Tensor | None = None
    prompt: Tensor | None = None
    labels: Tensor | None = None  # [B, L] int64, -100 for tokens without a loss
    experts: Tensor | None = None
    share: Tensor | float = 1.0
    """Factor of auxiliary losses: the share of this forward pass in the optimizer step, from 0 to 1."""
    hidden: Tensor | None = None
    """The last hidden states of the base model, [B, L, H]."""
    kept: dict[str, Gating] | None = None
    """Gates of whole sequences by scope or site, stored with the KV cache that the model was called with."""
    continues: bool = False
    """Whether the KV cache holds tokens of earlier forward passes."""
    gates: dict[str, Gating] = dataclasses.field(default_factory=dict)
    losses: dict[tuple[str, str], Tensor] = dataclasses.field(default_factory=dict)
    calls: dict[tuple[str, bool], int] = dataclasses.field(default_factory=dict)
    """How often each site was computed: (site, whether during a backward pass) -> count."""
    packs: Packs | None = None
    """Where the sequences of a packed batch are; None if each row is one sequence."""
    two_sided: bool = False
    """Whether the model is an encoder-decoder, whose two sequences differ in length."""

    def __reduce__(self) -> Any:
        return Forward, ()  # a copied model is outside of a forward pass, and tensors in a graph cannot be copied

    def recompute(self, site: str) -> None:
        """Count a computation of a site; RuntimeError if a backward pass computes it for an earlier forward pass."""
        if torch.compiler.is_compiling():
            return
        backward = torch._C._current_graph_task_id() != -1  # torch has no public function for this
        self.calls[site, backward] = self.calls.get((site, backward), 0) + 1
        if backward and self.calls[site, True] > self.calls.get((site, False), 0):
            raise RuntimeError(
                f"{site}: gradient checkpointing recomputed it for an earlier forward pass, whose tasks and masks are "
                f"no longer known; call backward after each forward pass"
            )

    def spread(self, gates: Tensor, lead: torch.Size) -> Tensor:
        """Reshape gates [N], [B, N] or [*lead, N] to broadcast to [*lead, N]. Raises ValueError if they do not fit."""
        if self.packs is not None and gates.ndim == 2 and self.packs.fits(lead) and len(gates) == len(self.packs):
            return self.packs.to_tokens(gates).view(*lead, -1)
        if gates.ndim == 1 or gates.shape[:-1] == lead:
            return gates
        rows = len(gates)
        # Gates of rows, for an activation [B, L, I] or, as in MoE blocks, [B L, I].
        if gates.ndim == 2 and lead and lead[0] == rows:
            return gates.view(rows, *[1] * (len(lead) - 1), -1)
        if gates.ndim == 2 and len(lead) == 1 and self.tokens is not None and lead[0] == rows * self.tokens:
            return gates.repeat_interleave(self.tokens, 0)
        if gates.shape[:-1].numel() == lead.numel():
            return gates.reshape(*lead, -1)
        raise ValueError(
            f"gates of shape {list(gates.shape)} do not fit an activation of shape {[*lead, '...']}: either its rows "
            f"cannot be identified, or the gates belong to another sequence"
        )

    def by_row(self, z: Tensor) -> Tensor:
        """z [..., I] as [B, L, I]. A single vector [I] is one row of one token. Sequences of packs get padding."""
        if self.packs is not None and self.packs.fits(z.shape[:-1]):
            return self.packs.apart(z)
        if z.ndim == 1:
            return z[None, None]
        if z.ndim == 2 and self.rows is not None and self.tokens is not None and len(z) == self.rows * self.tokens:
            return z.view(self.rows, self.tokens, -1)
        return z[:, None] if z.ndim == 2 else z.flatten(1, -2)

    def valid(self, lead: torch.Size) -> Tensor | None:
        """Which tokens of an activation [*lead, I] are not padding, bool [*lead]; None if there is no mask.

        In an encoder-decoder the mask belongs to the encoder: where it does not fit, all tokens count (None).
        Raises ValueError if the mask does not fit the activation of another model.
        """
        mask = self.mask
        if mask is None:
            return None
        # With a cache the mask also covers earlier tokens, but the activation has only the new ones.
        if len(lead) == 2 and mask.shape[0] == lead[0] and self.continues:
            mask = mask[:, -lead[1] :]
        if mask.shape != lead and mask.numel() != lead.numel():
            if self.two_sided:
                return None
            raise ValueError(
                f"the attention mask has shape {list(mask.shape)}, but an activation has {list(lead)} tokens; pass a "
                f"mask for these tokens with reparam.context(model, mask=...)"
            )
        return mask.reshape(lead)

    def pool(self, lead: torch.Size, over: str, device: torch.device) -> Tensor:
        """Which tokens of sequences a sequence router may read, bool [B, L]: all but padding, or only the prompt's.

        Raises ValueError if `over` is "prompt" and the prompt is unknown.
        """
        labels = self.labels
        if self.packs is not None and self.packs.places.shape == lead:
            valid = self.packs.there
            labels = (
                None if labels is None else self.packs.apart(labels[..., None] + 100)[..., 0] - 100
            )  # padding: -100
        else:
            known = self.valid(lead)
            valid = torch.ones(lead, dtype=torch.bool, device=device) if known is None else known
        if over == "all":
            return valid
        if self.prompt is not None:
            return valid & (valid.cumsum(1) <= self.prompt.to(device).view(-1, 1))
        if labels is not None and labels.shape == lead:
            # A label at i is predicted from the tokens before i. The tokens before the first label are the prompt.
            answered = labels.ne(-100)
            answered[:, 0] = False  # no token precedes the first one, so that its label is not used
            return valid & (answered.cumsum(1) == 0)
        if self.kept is not None:  # generation: the first forward pass with a cache holds the prompt
            return valid
        raise ValueError(
            "router 'sequence' reads the prompt only, and the prompt's length is unknown: train with labels, generate "
            "with a cache, or use reparam.context(model, prompt=lengths). pool='all' reads every token instead, which "
            "in a causal model leaks later tokens to earlier positions"
        )
