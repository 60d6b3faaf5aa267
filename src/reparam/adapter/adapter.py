"""The handle of one adapter on one model: what it trains, how it meets an optimizer, and how it is saved."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reparam.core.base import Role, Site, Storage, Update
from reparam.core.controller import Controller
from reparam.core.method import Method
from reparam.io import files
from reparam.io.record import Base, Packing, Record
from reparam.sites.fingerprint import fingerprint
from reparam.sites.module import SHARED, Adapted, Replaced
from reparam.sites.walk import base_parameters, storages_in, walk


class Adapter:
    """One adapter on one model: its method, its updates by site, what else it trains.

    It is made by `attach` or `load`. `parameters()` is everything that it trains and nothing else.
    """

    removable: ClassVar[bool] = True
    """Whether `remove` can take it off the model."""

    def __init__(self, name: str, method: Method, model: nn.Module) -> None:
        self.name = name
        self.method = method
        self.model = model
        self.sites: dict[str, Site] = {}
        self.modules: dict[str, Adapted] = {}
        self.replaced: dict[str, Replaced] = {}
        self.shared: nn.Module | None = None
        self.controller: Controller | None = None
        self._hooks: list[RemovableHandle] = []

    @property
    def positions(self) -> int:
        """How many positions of the model's context it takes from every text."""
        return 0

    @property
    def context(self) -> int | None:
        """How many positions the model has for everything, as far as its configuration says."""
        return getattr(getattr(self.model, "config", None), "max_position_embeddings", None)

    @property
    def updates(self) -> dict[str, Update]:
        """The updates by site."""
        return {name: module.updates[self.name] for name, module in self.modules.items()}  # type: ignore[misc]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter, Role | None]]:
        """Name as in files, parameter, and its role; the role of biases and of modules replaced whole is None."""
        for site, update in self.updates.items():
            for name, parameter in update.named_parameters():
                yield f"{site}.{name}", parameter, update.roles[name]
            if self.name in self.modules[site].biases:
                yield f"{site}.bias", self.modules[site].biases[self.name], None
        for path, module in self.replaced.items():
            for name, parameter in module.updates[self.name].named_parameters():
                yield f"{path}.{name}", parameter, None
        for name, parameter in self.shared.named_parameters() if self.shared is not None else ():
            yield f"{SHARED}.{name}", parameter, "core"

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is saved, by its name in files, detached: what it trains, and persistent buffers."""
        biases = {path: m.biases[self.name] for path, m in self.modules.items() if self.name in m.biases}
        copies = {path: holder.updates[self.name] for path, holder in self.replaced.items()}
        return saved(self.updates, biases, copies, self.shared)

    def parameters(self) -> list[nn.Parameter]:
        """Everything that this adapter trains."""
        return [parameter for _, parameter, _ in self.named_parameters()]

    def requires_grad_(self, trains: bool = True) -> Adapter:
        """Let the adapter train, or freeze it."""
        for parameter in self.parameters():
            parameter.requires_grad_(trains)
        return self

    def penalty(self) -> Tensor | None:
        """The sum of the updates' extra losses, or None when no update has one."""
        found = [p for p in (update.penalty() for update in self.updates.values()) if p is not None]
        return torch.stack(found).sum() if found else None

    def losses(self) -> dict[str, float]:
        """Auxiliary losses of the last forward in training by name, each a mean over the sites, without its factor.

        Their gradients come with the model's backward pass; they are in no loss that is returned or reported. Empty
        for methods without any.
        """
        found = getattr(self.shared, "losses", None)
        return found() if found is not None else {}

    def bind(self, optimizer: torch.optim.Optimizer, *, total_steps: int | None = None) -> Adapter:
        """Make whatever the method needs around a step happen at each `optimizer.step()`, of this optimizer only.

        `total_steps` is how many there will be, for a method with a schedule (AdaLoRA). Raises ValueError when such a
        method is not told, or its schedule does not fit; and when the adapter is frozen or the optimizer does not hold
        all of its parameters: it would train less than it seems to.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, p, _ in self.named_parameters() if id(p) not in held]
        frozen = [name for name, p, _ in self.named_parameters() if not p.requires_grad]
        if missing or frozen:
            what, names = ("not in the optimizer", missing) if missing else ("frozen", frozen)
            raise ValueError(
                f"adapter {self.name!r}: {len(names)} parameters are {what} (first: {names[0]}); make the optimizer "
                f"from adapter.parameters() after adapter.requires_grad_()"
            )
        base = [n for n, p in base_parameters(self.model) if p.requires_grad and id(p) in held]
        if base:
            raise ValueError(
                f"adapter {self.name!r}: the optimizer would also train {len(base)} parameters of the base model "
                f"(first: in {base[0]}); make it from adapter.parameters(), or train these modules with the adapter: "
                f"modules_to_save"
            )
        controller = self.controller
        if controller is not None:
            controller.plan(total_steps)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if controller is not None:
            self._hooks = [
                optimizer.register_step_pre_hook(lambda *_: controller.before_step()),
                optimizer.register_step_post_hook(lambda made, *_: controller.after_step(made)),
            ]
        return self

    def finish(self) -> str | None:
        """Say that training is over, for a method with a schedule.

        Returns a sentence where it ended before the schedule did, else None. `reparam train` calls it and prints that.
        """
        return self.controller.finish() if self.controller is not None else None

    def record(self) -> Record:
        """The adapter as plain data."""
        config = getattr(self.model, "config", None)
        source = str(getattr(config, "_name_or_path", "") or "")
        return Record(
            method=self.method.with_ranks_of(self.updates),
            sites=self.sites,
            tensors=self.tensors(),
            replaced=tuple(self.replaced),
            base=Base(type(self.model).__name__, source, fingerprint(self.model), _quantization(self.model)),
            modules=tuple(path for path, _ in walk(self.model)),
        )

    def save(self, folder: str | Path, *, format: str = "reparam") -> None:
        """Write the adapter, and nothing of the base, into `folder`; in one step, or not at all.

        `format` is "reparam" or "peft". Raises ValueError when a tensor is not finite, when the folder holds anything
        but an adapter, when the format cannot express the method, or when parameters are sharded (FSDP2).
        """
        sharded = [name for name, p, _ in self.named_parameters() if hasattr(p, "full_tensor")]
        if sharded:
            raise ValueError(
                f"adapter {self.name!r}: {len(sharded)} parameters are sharded (first: {sharded[0]}), and only whole "
                f"ones can be saved; copy `full_tensor()` of each into an adapter on an unsharded model, and save that"
            )
        if self.controller is not None and not self._hooks and any(p.requires_grad for p in self.parameters()):
            warnings.warn(
                f"adapter {self.name!r}: {self.method.name} acts around the optimizer's steps, and no optimizer was "
                f"bound: call adapter.bind(optimizer) before training",
                stacklevel=2,
            )
        record = self.record()
        bad = [key for key, t in record.tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
        if bad:
            raise ValueError(f"adapter {self.name!r}: NaN or infinity in {', '.join(bad[:5])}; not saved")
        files.write(folder, record, format=format)

    def __repr__(self) -> str:
        places = [*(m.updates for m in self.modules.values()), *(h.updates for h in self.replaced.values())]
        if any(self.name not in updates for updates in places):
            return f"{type(self).__name__}({self.name!r}, {self.method.name}, removed)"
        found = self.parameters()
        count = sum(p.numel() for p in found)
        frozen = "" if not found or any(p.requires_grad for p in found) else ", frozen"
        sites = f"{len(self.sites)} sites, " if self.sites else ""
        return f"{type(self).__name__}({self.name!r}, {self.method.name}, {sites}{count:,} parameters{frozen})"


def _quantization(model: nn.Module) -> tuple[Packing, ...]:
    held: dict[Storage, list[str]] = {}
    for path, storage in storages_in(model).items():
        held.setdefault(storage, []).append(path)
    return tuple(Packing(storage.name, storage.settings(), tuple(paths)) for storage, paths in held.items())


def saved(
    updates: Mapping[str, nn.Module],
    biases: Mapping[str, Tensor],
    copies: Mapping[str, nn.Module],
    shared: nn.Module | None,
) -> dict[str, Tensor]:
    """Every tensor that files hold, by its name there: parameters and persistent buffers."""
    parts = [*updates.items(), *copies.items(), *([] if shared is None else [(SHARED, shared)])]
    found = {f"{path}.{name}": tensor for path, module in parts for name, tensor in module.state_dict().items()}
    return found | {f"{path}.bias": bias.detach() for path, bias in biases.items()}
