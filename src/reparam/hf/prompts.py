"""Prefix and prompt tuning: PEFT's models behind the interface of an adapter.

`attach` and `load` give a handle whose `model` is a `PeftModel`, which takes the place of the base model from then on.
`reparam.select` puts the positions in front of the text, or leaves them out. Files are PEFT's own folders, which say
which base they were trained on and bind nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reparam.adapter.adapter import Adapter
from reparam.adapter.selection import AdapterState, Choice, Selection, state_of
from reparam.adapter.without_sites import fill_from, put_on, read_back
from reparam.core.method import Method
from reparam.errors import FormatError
from reparam.io.native import pack_tensors, parse_tensors, read_bytes, read_json
from reparam.io.peft_formats import CONFIG, WEIGHTS
from reparam.io.staged import staged_folder
from reparam.methods.prompts import Prefix, Prompt, Prompting
from reparam.sites.walk import storages_in

KINDS: dict[str, type[Prompting]] = {"PREFIX_TUNING": Prefix, "PROMPT_TUNING": Prompt}


class Prompts(Adapter):
    """The handle of positions that train: `parameters()` are theirs, `model` is PEFT's."""

    method: Prompting
    removable = False

    def __init__(self, name: str, method: Prompting, model: Any) -> None:
        super().__init__(name, method, model)
        self.shared = model.prompt_encoder[name]

    @property
    def positions(self) -> int:
        """As many as it trains."""
        return self.method.tokens

    def save(self, folder: str | Path, *, format: str = "peft") -> None:
        """Write PEFT's folder, in one step or not at all. Raises ValueError where a number is not finite."""
        model: Any = self.model
        tensors = {"prompt_embeddings": model.get_prompt_embedding_to_save(self.name)}
        if not torch.isfinite(tensors["prompt_embeddings"]).all():
            raise ValueError(f"adapter {self.name!r}: NaN or infinity in prompt_embeddings; not saved")
        config = copy.copy(model.peft_config[self.name])
        config.inference_mode = True
        with staged_folder(folder, owned=True) as staging:
            config.save_pretrained(staging)
            (staging / WEIGHTS).write_bytes(pack_tensors(tensors, metadata={"format": "pt"}))

    @torch.no_grad()
    def fill(self, folder: Path) -> None:
        """Take the saved values. Raises FormatError for a damaged file, or one of other shapes."""
        found = parse_tensors(read_bytes(folder / WEIGHTS), folder / WEIGHTS)
        own: Tensor = self.shared.embedding.weight  # type: ignore[union-attr, assignment]
        value = found.get("prompt_embeddings")
        if value is None or len(found) > 1 or value.shape != own.shape:
            shapes = {key: list(tensor.shape) for key, tensor in found.items()}
            raise FormatError(f"{folder / WEIGHTS}: holds {shapes}, expected prompt_embeddings {list(own.shape)}")
        own.copy_(value)


class PromptState(AdapterState):
    """The choice among positions that train: one of them, or none."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._without = contextlib.ExitStack()

    def select(self, which: Choice) -> Selection:
        """See `reparam.select`. Raises ValueError for a list: these positions are the same for a whole batch."""
        if which is not None and not isinstance(which, str):
            raise ValueError("prefix and prompt tuning have no mixed batches; select one adapter by its name")
        selection = super().select(which)
        self._without.close()
        model: Any = self.model
        if which is None:
            self._without.enter_context(model.disable_adapter())
        else:
            model.active_adapter = which
        return selection

    def forget(self, name: str) -> None:
        """There is no way back. Raises ValueError."""
        raise ValueError(f"adapter {name!r}: PEFT's model cannot be undone here; load the base model again")


def attach(model: nn.Module, method: Prompting, *, name: str = "default") -> Prompts:
    """Fresh positions in front of what `model` reads, selected; everything else is frozen.

    The handle's `model` is to be used from then on. Raises ValueError without PEFT, and for a quantized base, which
    PEFT's files could not name.
    """
    peft = _peft(method)
    if storages_in(model):
        raise ValueError(f"{method.name}: PEFT's files do not say how a base was quantized; use base.storage dense")
    make = getattr(peft, method.peft_config)
    config = make(task_type="CAUSAL_LM", num_virtual_tokens=method.tokens, **method.peft_settings)
    with torch.random.fork_rng():
        torch.manual_seed(method.seed)
        made = _with(model, peft, config, name)
    adapter = _known(made, method, name).requires_grad_()
    state_of(made).select(name)
    return adapter  # type: ignore[return-value]


def load(model: nn.Module, folder: str | Path, *, name: str = "default", activate: bool = True) -> Prompts:
    """The saved positions in front of what `model` reads, frozen; selected unless `activate` is False.

    `model` is a base, or has such positions already. Raises FormatError for a folder that is damaged or does not fit.
    """
    folder = Path(folder)
    kind = prompting_of(folder)
    if kind is None:
        raise FormatError(f"{folder}: neither prefix nor prompt tuning is in {CONFIG}")
    config = _peft(kind).PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    made = _with(model, _peft(kind), config, name)
    adapter = _known(made, kind, name)
    adapter.fill(folder)
    adapter.requires_grad_(False)
    if activate:
        state_of(made).select(name)
    return adapter


@put_on.register
def _(method: Prompting, model: nn.Module) -> Prompts:
    return attach(model, method)


@read_back.register
def _(adapter: Prompts, folder: Path, *, name: str) -> Prompts:
    return load(adapter.model, folder, name=name, activate=False)


@fill_from.register
def _(adapter: Prompts, folder: Path) -> None:
    adapter.fill(folder)


def prompting_of(folder: Path) -> Prompting | None:
    """The method whose PEFT folder this is; None for any other folder."""
    if not (folder / CONFIG).is_file():
        return None
    values = read_json(folder / CONFIG)
    cls = KINDS.get(str(values.get("peft_type")))
    return None if cls is None else cls(tokens=values.get("num_virtual_tokens"))  # type: ignore[arg-type]


def is_prompted(model: nn.Module) -> bool:
    """Whether there are positions that train in front of what this model reads."""
    return isinstance(getattr(model, "reparam_state", None), PromptState)


def base_of(folder: Path) -> str:
    """The base that such a folder names. Raises FormatError where it names none."""
    source = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not source:
        raise FormatError(f"{folder} does not say what its base is; give --base with a folder or hub id")
    return str(source)


def _with(model: nn.Module, peft: Any, config: Any, name: str) -> Any:
    """PEFT's model with positions of this name."""
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
        return model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT's own, about transformers
        made = peft.get_peft_model(model, config, adapter_name=name)
    made.reparam_state = PromptState(made)
    made.register_forward_hook(_trim, with_kwargs=True)
    return made


def _known(model: Any, method: Prompting, name: str) -> Prompts:
    adapter = Prompts(name, method, model)
    state_of(model).adopt(adapter)
    return adapter


def _trim(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Leave out the scores at a prompt's own positions, so that there is one for each token of the text."""
    ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    output.logits = output.logits[:, -ids.shape[1] :]
    return output


def _peft(method: Method) -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError(f"{method.name} needs PEFT, which is not installed: pip install 'reparam[peft]'") from None
    return peft
