"""The rank budget of AdaLoRA: its schedule, and which components it masks (arXiv 2303.10512, §3.2, §3.3).

The budget is b₀ components for `tinit` steps, falls along a cubic curve to b_T at step T - tfinal, and stays at b_T:

    b(t) = floor(b_T + (b₀ - b_T) (1 - (t - tinit) / (T - tinit - tfinal))³)        t = 0, 1, ..., T - 1

The paper's appendix has t - tinit - tfinal in the numerator. That is a misprint: the curve would begin above b₀ and end
with a jump. The released code has the form above.

After every `delta_t`-th step of the fall, the b(t) components with the highest importance keep their λ, and the λ of
all others is set to zero. A masked component continues to train and can be selected again until step T - tfinal. The
selection of that step is final: the masked components are removed from the parameters and from the optimizer state,
which does not change the function. With tfinal = 0 this happens after the last step.

The importance of a component is the importance of its λ plus the mean importances of its column of P and its row of Q.
The importance of one number w is Ī Ū, from its sensitivity I = |w ∂L/∂w|. Both averages start at zero:

    Ī <- β₁ Ī + (1 - β₁) I        Ū <- β₂ Ū + (1 - β₂) |I - Ī|

The gradient is the one that the optimizer sees, including that of the orthogonality penalty. The penalty's gradient is
added to P and Q just before the step, after any clipping. The loss that a training loop reports does not include it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reparam.core.shrink import cannot_shrink, shrink
from reparam.methods.adalora.update import SVDUpdate


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The schedule of the budget, in optimizer steps counted from 0."""

    total: int
    tinit: int
    tfinal: int
    every: int
    milestones: tuple[int, ...] = ()

    @property
    def final(self) -> int:
        """The step after which the selection is final."""
        return min(self.total - self.tfinal, self.total - 1)

    def budget(self, step: int, first: int, last: int) -> int:
        """The number of active components after this step; it falls from `first` to `last`.

        >>> [Schedule(40, 5, 10, 5).budget(t, 12, 8) for t in (5, 6, 8, 11, 15, 39)]
        [12, 11, 10, 9, 8, 8]
        """
        if step <= self.tinit and step < self.final:
            return first
        if step >= self.final:
            return last
        left = 1 - (step - self.tinit) / (self.total - self.tfinal - self.tinit)
        return int(last + (first - last) * left**3)

    def masks(self, step: int) -> bool:
        """Whether components are selected and masked after this step."""
        falling = self.tinit < step and (step % self.every == 0 or step in self.milestones)
        return falling or step >= self.final


@dataclasses.dataclass(frozen=True)
class Rules:
    """The settings of a budget: the fields of `AdaLoRA` with the same names."""

    target_r: float
    total_steps: int | None
    tinit: int | None
    tfinal: int | None
    delta_t: int
    milestones: tuple[int, ...]
    beta1: float
    beta2: float
    score: str
    orth_weight: float
    orth_form: str

    def plan(self, total_steps: int) -> Schedule:
        """The schedule of a run of `total_steps` optimizer steps.

        Raises ValueError if tinit and tfinal leave no step between them, or a milestone is outside of the fall.
        """
        tinit = total_steps // 6 if self.tinit is None else self.tinit
        tfinal = total_steps // 2 if self.tfinal is None else self.tfinal
        if total_steps <= tinit + tfinal:
            raise ValueError(
                f"AdaLoRA: {total_steps} steps are too few for tinit={tinit} and tfinal={tfinal}: no step is left for "
                f"the fall of the budget; train longer, or lower them"
            )
        late = [step for step in self.milestones if not tinit < step < total_steps - tfinal]
        if late:
            raise ValueError(
                f"AdaLoRA: milestones={self.milestones!r}: {late[0]} is outside of the fall of the budget; expected "
                f"steps above {tinit} and below {total_steps - tfinal}"
            )
        return Schedule(total_steps, tinit, tfinal, self.delta_t, self.milestones)


class Budget:
    """The rank budget of one adapter: a `Controller` that masks and removes components around optimizer steps."""

    def __init__(self, rules: Rules, updates: Mapping[str, SVDUpdate]) -> None:
        self.rules = rules
        self.updates = dict(updates)
        self.plan_: Schedule | None = None if rules.total_steps is None else rules.plan(rules.total_steps)
        self.step = 0
        self.first = sum(len(update.E) for update in self.updates.values())
        self.last = min(round(rules.target_r * len(self.updates)), self.first)
        self.mean: list[Tensor] = []  # Ī of λ [R], Q [R, I] and P [O, R], site after site
        self.deviation: list[Tensor] = []  # Ū, in the same order
        self.places: list[Tensor] | None = None  # final masks, bool [R] per site; [] once removed

    @property
    def quantized(self) -> bool:
        """Whether the selection is final and the masked components are removed."""
        return self.places is not None and not self.places

    def plan(self, total_steps: int | None) -> None:
        """Set the number of optimizer steps of the run; None if only `AdaLoRA.total_steps` has it.

        Raises ValueError if the number is unknown, differs from `AdaLoRA.total_steps` or from that of the steps already
        made, if the schedule does not fit, and if parameters are sharded.
        """
        if any(hasattr(p, "full_tensor") for p in self._parameters()):
            raise ValueError("AdaLoRA: the parameters are sharded (FSDP2), and the budget needs whole ones; use DDP")
        own = self.rules.total_steps
        if own is None and total_steps is None and self.plan_ is None:
            raise ValueError(
                "AdaLoRA: the schedule of the budget needs the number of optimizer steps; call "
                "adapter.bind(optimizer, total_steps=...), or set AdaLoRA(total_steps=...)"
            )
        if own is not None and total_steps is not None and own != total_steps:
            raise ValueError(
                f"AdaLoRA: total_steps={own}, but the run has {total_steps} steps; remove total_steps from the method, "
                f"or set it to {total_steps}"
            )
        if total_steps is not None:
            found = self.rules.plan(total_steps)
            if self.step and self.plan_ is not None and found != self.plan_:
                raise ValueError(
                    f"AdaLoRA: {self.step} steps were made with a schedule of {self.plan_.total} steps, but this run "
                    f"has {total_steps}; continue with {self.plan_.total} steps, or start again"
                )
            self.plan_ = found

    @torch.no_grad()
    def before_step(self) -> None:
        """Add the gradient of the orthogonality penalty. Raises ValueError if a parameter has no gradient."""
        lost = [name for name, update in self.updates.items() if any(p.grad is None for p, _ in update.parts())]
        if lost:
            raise ValueError(
                f"AdaLoRA: {len(lost)} of {len(self.updates)} sites have no gradient (first: {lost[0]}), and the "
                f"budget compares all sites at each step; call backward before the step and zero_grad after it, and "
                f"remove layers that the model does not use from the targets"
            )
        if self.rules.orth_weight:
            self._orthogonal()
        if self.rules.score == "before":
            self._observe()

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Update the importances, and mask or remove components at the steps of the schedule.

        Raises ValueError if an importance is NaN or infinite.
        """
        assert self.plan_ is not None
        if self.rules.score == "after":
            self._observe()
        if self.places is None and self.plan_.masks(self.step):
            places = self._choose(self.plan_.budget(self.step, self.first, self.last))
            if self.step >= self.plan_.final:
                self.places, self.mean, self.deviation = places, [], []
            if self.step >= self.plan_.final or self.step in self.plan_.milestones:
                self._drop(places, optimizer)
        elif self.places:
            self._mask(self.places)
        self.step += 1

    @torch.no_grad()
    def finish(self) -> str | None:
        """Remove masked components that could not be removed during training.

        Returns a warning for the user if training ended before the final selection, else None.
        """
        if self.places is not None:
            if self.places:
                self._drop(self.places, None)
            return None
        if self.plan_ is None or self.step == 0:
            return "AdaLoRA: no step was made through a bound optimizer, so the ranks are still the initial ones"
        budget = self.plan_.budget(self.step - 1, self.first, self.last)
        return (
            f"AdaLoRA: the run ended after {self.step} of {self.plan_.total} steps, before the ranks were final: the "
            f"budget was {budget} components, and the schedule ends at {self.last}"
        )

    def state_dict(self) -> dict[str, Any]:
        """The step, the averages Ī and Ū, and the final masks, for `load_state_dict`."""
        return {
            "step": self.step,
            "total": None if self.plan_ is None else self.plan_.total,
            "sites": list(self.updates),
            "first": self.first,
            "mean": [t.clone() for t in self.mean],
            "deviation": [t.clone() for t in self.deviation],
            "places": None if self.places is None else [t.clone() for t in self.places],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; the updates must have the ranks that they had when it was made.

        Raises ValueError if the state has other sites or other ranks.
        """
        if state["sites"] != list(self.updates):
            raise ValueError("AdaLoRA: the saved budget is for other sites; use the same targets, or start again")
        places = state["places"]
        for name, at in (("mean", 3), ("deviation", 3), ("places", 1)):
            saved = state[name] or []
            shapes = [p.shape for update in self.updates.values() for p, _ in update.parts()[:at]]
            if saved and [t.shape for t in saved] != shapes:
                raise ValueError(f"AdaLoRA: {name} of the saved budget have other ranks than the sites of the adapter")
        device = next(iter(self.updates.values())).E.device
        self.step, self.first = state["step"], state["first"]
        self.last = min(self.last, self.first)
        self.mean = [t.to(device) for t in state["mean"]]
        self.deviation = [t.to(device) for t in state["deviation"]]
        self.places = None if places is None else [t.to(device) for t in places]
        self.plan_ = None if state["total"] is None else self.rules.plan(state["total"])

    # ---- parts of a step

    def _parameters(self) -> list[Tensor]:
        return [parameter for update in self.updates.values() for parameter, _ in update.parts()]

    def _orthogonal(self) -> None:
        """Add the gradient of γ R(P, Q): squared norms (paper) or the mean norm (reference) of QQᵀ − 1 and PᵀP − 1."""
        squared = self.rules.orth_form == "paper"
        factor = self.rules.orth_weight * (4.0 if squared else 1.0 / len(self.updates))
        for update in self.updates.values():
            for parameter, tall in ((update.A, False), (update.B, True)):
                assert parameter.grad is not None
                v = parameter.t() if tall else parameter  # [R, I] or [R, O]
                off = v @ v.t()
                off.diagonal().sub_(1)
                term = (parameter @ off if tall else off @ parameter).mul_(factor)
                if not squared:
                    norm = torch.linalg.matrix_norm(off)
                    term.div_(torch.where(norm == 0, 1, norm))  # where the norm is zero, its subgradient is zero
                parameter.grad.add_(term.to(parameter.grad.dtype))

    def _observe(self) -> None:
        """Update Ī and Ū, until the selection is final."""
        assert self.plan_ is not None
        if self.places is not None or (self.step >= self.plan_.final and self.mean):
            return
        parameters = self._parameters()
        if not self.mean:
            self.mean = [torch.zeros_like(p, requires_grad=False) for p in parameters]
            self.deviation = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        found = torch._foreach_mul(parameters, gradients)
        torch._foreach_abs_(found)
        torch._foreach_lerp_(self.mean, found, 1 - self.rules.beta1)
        torch._foreach_sub_(found, self.mean)
        torch._foreach_abs_(found)
        torch._foreach_lerp_(self.deviation, found, 1 - self.rules.beta2)

    def _choose(self, budget: int) -> list[Tensor]:
        """Mask all but the `budget` most important components (ties: larger |λ| first). Returns bool [R] per site."""
        products = torch._foreach_mul(self.mean, self.deviation)
        scores = torch.cat(
            [e + a.mean(1) + b.mean(0) for e, a, b in zip(products[::3], products[1::3], products[2::3], strict=True)]
        )
        if not bool(scores.isfinite().all()):
            raise ValueError("AdaLoRA: the importance of a component is NaN or infinite; lower the learning rate")
        sizes = torch.cat([update.E for update in self.updates.values()]).abs()
        order = sizes.argsort(descending=True, stable=True)
        order = order[scores[order].argsort(descending=True, stable=True)]
        places = torch.zeros_like(scores, dtype=torch.bool)
        places[order[:budget]] = True
        split = list(places.split([len(update.E) for update in self.updates.values()]))
        self._mask(split)
        return split

    def _mask(self, places: list[Tensor]) -> None:
        for update, has in zip(self.updates.values(), places, strict=True):
            update.E.masked_fill_(~has, 0)

    def _drop(self, places: list[Tensor], optimizer: torch.optim.Optimizer | None) -> None:
        """Remove the masked components from the parameters and the optimizer state.

        With several processes, or with an optimizer whose state cannot shrink, it does nothing and the components stay
        masked. DDP exchanges gradients in buckets of fixed sizes.
        """
        if optimizer is not None and (_processes() > 1 or cannot_shrink(optimizer, self._parameters())):
            return
        kept = [has.nonzero().flatten() for has in places]
        for statistics in (self.mean, self.deviation):
            for number, tensor in enumerate(statistics):
                statistics[number] = tensor.index_select(1 if number % 3 == 2 else 0, kept[number // 3])
        lost = [(u, i) for u, i in zip(self.updates.values(), kept, strict=True) if len(i) < len(u.E)]
        shrink({parameter: (dim, index) for update, index in lost for parameter, dim in update.parts()}, optimizer)
        if self.places is not None:
            self.places = []


def _processes() -> int:
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if spread else 1
