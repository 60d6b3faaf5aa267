"""Give modules that share parameters their own copies, so that each can be adapted, and the saved model reads back.

transformers ties the weights that `_tied_weights_keys` of a model's class names, in all classes of a model whose
configuration has `tie_word_embeddings`. So one setting holds several ties: BART's also ties the embeddings of its
encoder and decoder. All of them end together.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from reparam.sites.module import Adapted
from reparam.sites.reads import reads_setting
from reparam.sites.replaced import Replaced
from reparam.sites.walk import walk
from reparam.sites.wrapped import at, bare

SETTING = "tie_word_embeddings"


def untie(model: nn.Module) -> None:
    """Give each module its own copy of the parameters and buffers that it shares with other modules.

    The outputs stay the same. Each copy takes memory: one more matrix for a tied head, three for BART. What
    `save_pretrained` writes afterwards reads back as the same model, because `config.tie_word_embeddings` is turned
    off. A few models compute something else without it (T5, mT5, UMT5, LongT5, Pop2Piano, UDOP, Switch Transformers):
    there it stays on, and transformers ties copies again on loading if they are equal.

    Does nothing if nothing is shared. Raises ValueError if an adapter is on shared weights.

    >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    >>> model[1].weight = model[0].weight
    >>> untie(model)
    >>> model[1].weight is model[0].weight
    False
    """
    model = bare(model)
    taken = [path for path, module in walk(model) if isinstance(module, Adapted | Replaced) and module.updates]
    holders = _holders(model)
    busy = [path for path in taken if any(at(model, path) in modules for modules in holders.values())]
    if busy:
        raise ValueError(f"untie: an adapter is on {busy[0]}, which shares its weight; merge or remove it first")
    _part_modules(model)
    for key, modules in _holders(model).items():
        for module in modules[1:]:
            _own_copies(module, key)
    models = [m for m in model.modules() if hasattr(m, "get_expanded_tied_weights_keys")]
    off = _can_turn_off(model)
    for part in (model, *models) if off else ():
        _turn_off(getattr(part, "config", None))  # a part may have a copy of the configuration, as T5's stacks do
    for part in models:
        part.all_tied_weights_keys = {}  # type: ignore[assignment]
        if not off:
            part._tied_weights_keys = {}  # type: ignore[assignment]  # so that `tie_weights` leaves the copies alone


def _holders(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that hold each shared parameter or buffer, by the `id` of the tensor."""
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for tensor in {id(t): t for t in _own(module).values()}.values():
            found.setdefault(id(tensor), []).append(module)
    return {key: modules for key, modules in found.items() if len(modules) > 1}


def _own(module: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}


def _own_copies(module: nn.Module, key: int) -> None:
    """Replace the tensor with this `id` in one module by a copy."""
    for name, tensor in _own(module).items():
        if id(tensor) == key:
            values = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                values = nn.Parameter(values, requires_grad=tensor.requires_grad)
                module._parameters[name] = values
            else:
                module._buffers[name] = values
            if hasattr(tensor, "_is_hf_initialized"):
                values._is_hf_initialized = tensor._is_hf_initialized  # type: ignore[attr-defined]


def _part_modules(model: nn.Module) -> None:
    """Copy modules that are at two paths of which the model's class ties one to the other, as BART's after a resize."""
    tied: dict[str, str] = {}
    if hasattr(model, "get_expanded_tied_weights_keys"):
        tied = model.get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[operator]
    for target, source in tied.items():
        path, other = target.rpartition(".")[0], source.rpartition(".")[0]
        if path and model.get_submodule(path) is model.get_submodule(other):
            model.set_submodule(path, copy.deepcopy(model.get_submodule(path)))


def _can_turn_off(model: nn.Module) -> bool:
    """Whether the model computes the same without the setting, and its configuration reads back as it is written."""
    if reads_setting(model, SETTING):
        return False
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        return True
    trial = copy.deepcopy(config)
    _turn_off(trial)
    try:
        on, off = _read_back(config), _read_back(trial)
    except Exception:  # transformers refuses to write or to read this configuration, so no file of it reads back
        return True
    still_on = next(_configs(off), None)
    _turn_off(on)
    return still_on is None and bool(off.to_json_string(use_diff=False) == on.to_json_string(use_diff=False))


def _read_back(config: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return type(config).from_pretrained(folder)


def _turn_off(config: Any) -> None:
    for part in _configs(config):
        setattr(part, SETTING, False)


def _configs(config: Any) -> Iterator[Any]:
    """The configuration and those inside it that have the setting on."""
    if getattr(config, SETTING, False):
        yield config
    for part in list(vars(config).values()) if hasattr(config, "save_pretrained") else ():
        if hasattr(part, "save_pretrained"):
            yield from _configs(part)
