"""The `Adapter` class: one adapter on one model, with its parameters, its optimizer hooks and saving."""

from __future__ import annotations

import os
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
from reparam.core.text import counted
from reparam.io import files
from reparam.io.head import Head
from reparam.io.prompt_format import PromptFormat
from reparam.io.record import Base, Packing, Record, Tied
from reparam.sites.expert_paths import numbers_of_experts
from reparam.sites.fingerprint import fingerprint
from reparam.sites.module import SHARED, Adapted
from reparam.sites.offloaded import offloads
from reparam.sites.replaced import Replaced
from reparam.sites.walk import base_parameters, storages_in, walk


class Adapter:
    """One adapter on one model: its method, its updates by site, and its trained biases and whole modules.

    `attach` and `load` create it. `parameters()` returns all parameters that the adapter trains, and no others.
    """

    removable: ClassVar[bool] = True
    """Whether `remove` can take this adapter off the model."""

    def __init__(self, name: str, method: Method, model: nn.Module) -> None:
        self.name = name
        self.method = method
        self.model = model
        self.sites: dict[str, Site] = {}
        self.modules: dict[str, Adapted] = {}
        self.tied: dict[str, str] = {}
        """The modules, by path, that use the update of a site because they share its weight: path -> path of the
        site. `modules` has them, `sites` and `updates` do not."""
        self.replaced: dict[str, Replaced] = {}
        self.shared: nn.Module | None = None
        self.controller: Controller | None = None
        self.prompt_format: PromptFormat | None = None
        """How the adapter is prompted, which `save` writes beside it; None when unknown."""
        self.head: Head | None = None
        """What the model is for, which `save` writes beside it; None for a causal language model."""
        self._hooks: list[RemovableHandle] = []

    @property
    def positions(self) -> int:
        """Number of context positions that the adapter occupies in every sequence, such as virtual tokens."""
        return 0

    @property
    def context(self) -> int | None:
        """The model's context length (`max_position_embeddings`); None if its configuration does not state it."""
        return getattr(getattr(self.model, "config", None), "max_position_embeddings", None)

    @property
    def updates(self) -> dict[str, Update]:
        """The updates of all adapted modules, by the module's path."""
        found = {name: module for name, module in self.modules.items() if name not in self.tied}
        return {name: module.updates[self.name] for name, module in found.items()}  # type: ignore[misc]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter, Role | None]]:
        """Yield (name in saved files, parameter, role) for each trained parameter.

        The role is None for biases and for parameters of modules that train whole.
        """
        updates = self.updates
        for site, module in self.modules.items():
            for name, parameter in updates[site].named_parameters() if site in updates else ():
                yield f"{site}.{name}", parameter, updates[site].roles[name]
            if self.name in module.biases:
                yield f"{site}.bias", module.biases[self.name], None
        seen: set[nn.Parameter] = set()
        for path, holder in self.replaced.items():
            for name, parameter in holder.updates[self.name].named_parameters():
                if parameter not in seen:  # copies of modules that share a weight share it, too
                    seen.add(parameter)
                    yield f"{path}.{name}", parameter, None
        for name, parameter in self.shared.named_parameters() if self.shared is not None else ():
            yield f"{SHARED}.{name}", parameter, "core"

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that `save` writes, detached, by their names in the file: parameters and persistent buffers."""
        biases = {path: m.biases[self.name] for path, m in self.modules.items() if self.name in m.biases}
        copies = {path: holder.updates[self.name] for path, holder in self.replaced.items()}
        return saved(self.updates, biases, copies, self.shared)

    def parameters(self) -> list[nn.Parameter]:
        """All parameters that this adapter trains."""
        return [parameter for _, parameter, _ in self.named_parameters()]

    def requires_grad_(self, trains: bool = True) -> Adapter:
        """Set `requires_grad` of all parameters of the adapter: True to train it, False to freeze it."""
        for parameter in self.parameters():
            parameter.requires_grad_(trains)
        return self

    def penalty(self) -> Tensor | None:
        """The sum of the updates' penalty terms, a scalar to add to the loss; None if no update has one."""
        found = [p for p in (update.penalty() for update in self.updates.values()) if p is not None]
        return torch.stack(found).sum() if found else None

    def losses(self) -> dict[str, float]:
        """Auxiliary losses of the last training forward pass by name, each a mean over sites, without its factor.

        The model's backward pass already adds their gradients. No returned or reported loss includes these values.
        Empty for methods without auxiliary losses.
        """
        found = getattr(self.shared, "losses", None)
        return found() if found is not None else {}

    def bind(self, optimizer: torch.optim.Optimizer, *, total_steps: int | None = None) -> Adapter:
        """Run the method's hooks before and after each `optimizer.step()` of this optimizer, and of no other.

        `total_steps` is the number of optimizer steps; a method with a schedule (AdaLoRA) needs it. Raises ValueError
        if a method with a schedule gets no `total_steps` or if its schedule does not fit into them, if a parameter of
        the adapter is frozen, or if the optimizer does not hold all parameters of the adapter.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, p, _ in self.named_parameters() if id(p) not in held]
        frozen = [name for name, p, _ in self.named_parameters() if not p.requires_grad]
        if missing or frozen:
            what, names = ("not in the optimizer", missing) if missing else ("frozen", frozen)
            are = "parameter is" if len(names) == 1 else "parameters are"
            raise ValueError(
                f"adapter {self.name!r}: {len(names):,} {are} {what} (first: {names[0]}); make the optimizer "
                f"from adapter.parameters() after adapter.requires_grad_()"
            )
        own = {id(p) for p in self.parameters()}
        base = [n for n, p in base_parameters(self.model) if p.requires_grad and id(p) in held - own]
        if base:
            raise ValueError(
                f"adapter {self.name!r}: the optimizer would also train "
                f"{counted(len(base), 'parameter')} of the base model (first: in {base[0]}); make it from "
                f"adapter.parameters(), or train these modules with the adapter: modules_to_save"
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
        """End the schedule of a method that has one; call this after training.

        Returns a sentence if training ended before the schedule did, else None. `reparam train` prints this sentence.
        """
        return self.controller.finish() if self.controller is not None else None

    def record(self) -> Record:
        """The adapter as plain data, as the file formats write it."""
        config = getattr(self.model, "config", None)
        source = str(getattr(config, "_name_or_path", "") or "")
        if os.path.exists(source):  # a relative path means nothing in another folder, and could be taken for a hub id
            source = os.path.abspath(source)
        return Record(
            method=self.method.with_ranks_of(self.updates),
            sites=self.sites,
            tensors=self.tensors(),
            replaced=tuple(self.replaced),
            base=Base(
                type(self.model).__name__,
                source,
                fingerprint(self.model, without=self.replaced),
                _quantization(self.model),
            ),
            tied={path: Tied(site, self.modules[path].kind) for path, site in self.tied.items()},
            modules=tuple(path for path, _ in walk(self.model)),
            experts=numbers_of_experts(self.model),
            model_type=str(getattr(config, "model_type", "") or ""),
            prompt_format=self.prompt_format,
            head=self.head,
        )

    def check_values(self, what: str) -> None:
        """Raise ValueError, with `what` that means, if parameters of the adapter are on the device "meta"."""
        empty = [name for name, p, _ in self.named_parameters() if p.is_meta]
        if not empty:
            return
        found = f"adapter {self.name!r}: {len(empty)} parameters are on the device 'meta' (first: {empty[0]})"
        if any(offloads(holder.updates[self.name]) for holder in self.replaced.values()):
            raise ValueError(
                f"{found}, because accelerate offloaded modules that the adapter trains whole, so {what}; call "
                f"accelerate.hooks.remove_hook_from_submodules(model), and offload a model before you attach to it"
            )
        raise ValueError(
            f"{found}, which holds no values, so {what}; move the model to another device and set them first"
        )

    def save(self, folder: str | Path, *, format: str = "reparam") -> None:
        """Write the adapter without the base model into `folder`, atomically.

        `format` is "reparam" or "peft". Raises ValueError if a tensor is not finite, the folder holds files other than
        those of an adapter in this format, the format cannot express the method, or parameters are sharded (FSDP2).
        Warns if the method needs `bind` and no optimizer was bound.
        """
        sharded = [name for name, p, _ in self.named_parameters() if hasattr(p, "full_tensor")]
        if sharded:
            raise ValueError(
                f"adapter {self.name!r}: {len(sharded)} parameters are sharded (first: {sharded[0]}), and sharded "
                f"parameters cannot be saved; copy `full_tensor()` of each into an adapter on an unsharded model, and "
                f"save that adapter"
            )
        self.check_values("there is nothing to save")
        if self.controller is not None and not self._hooks and any(p.requires_grad for p in self.parameters()):
            warnings.warn(
                f"adapter {self.name!r}: {self.method.name} has to run before and after optimizer steps, and no "
                f"optimizer was bound; call adapter.bind(optimizer) before training",
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
        sites = f"{counted(len(self.sites), 'site')}, " if self.sites else ""
        return f"{type(self).__name__}({self.name!r}, {self.method.name}, {sites}{counted(count, 'parameter')}{frozen})"


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
    """All tensors that a saved adapter holds, by their names in the file: parameters and persistent buffers."""
    parts = [*updates.items(), *copies.items(), *([] if shared is None else [(SHARED, shared)])]
    found = {f"{path}.{name}": tensor for path, module in parts for name, tensor in module.state_dict().items()}
    return found | {f"{path}.bias": bias.detach() for path, bias in biases.items()}
