"""Prefix and prompt tuning: models of PEFT with the interface of an adapter.

`attach` and `load` return an adapter whose `model` is a `PeftModel`; use it in place of the base model.
`reparam.select` turns the virtual tokens on and off. The files are those of PEFT. They name the base model, but hold no
checksum of it.
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
from reparam.io.files import check_holds_only
from reparam.io.native import pack_tensors, parse_tensors, read_bytes, read_json
from reparam.io.peft_formats import CONFIG
from reparam.io.peft_weights import WEIGHTS
from reparam.io.staged import staged_folder
from reparam.methods.prompts import Prefix, Prompt, Prompting
from reparam.sites.walk import storages_in

KINDS: dict[str, type[Prompting]] = {"PREFIX_TUNING": Prefix, "PROMPT_TUNING": Prompt}


class Prompts(Adapter):
    """An adapter of trainable virtual tokens. `model` is the `PeftModel`."""

    method: Prompting
    removable = False

    def __init__(self, name: str, method: Prompting, model: Any) -> None:
        super().__init__(name, method, model)
        self.shared = model.prompt_encoder[name]

    @property
    def positions(self) -> int:
        """Number of virtual tokens."""
        return self.method.tokens

    def save(self, folder: str | Path, *, format: str = "peft") -> None:
        """Write a folder in PEFT's format, atomically.

        Raises ValueError if a value is NaN or infinite, or the folder holds files other than those of an adapter.
        """
        check_holds_only(Path(folder), (CONFIG, WEIGHTS))
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
        """Copy the saved values into this adapter. Raises FormatError for a damaged file and for other shapes."""
        found = parse_tensors(read_bytes(folder / WEIGHTS), folder / WEIGHTS)
        own: Tensor = self.shared.embedding.weight  # type: ignore[union-attr, assignment]
        value = found.get("prompt_embeddings")
        if value is None or len(found) > 1 or value.shape != own.shape:
            shapes = {key: list(tensor.shape) for key, tensor in found.items()}
            raise FormatError(f"{folder / WEIGHTS}: holds {shapes}, expected prompt_embeddings {list(own.shape)}")
        own.copy_(value)


class PromptState(AdapterState):
    """Selects one adapter of virtual tokens, or none."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._without = contextlib.ExitStack()

    def select(self, which: Choice, **settings: Any) -> Selection:
        """See `reparam.select`. Raises ValueError for a list, because all rows of a batch share one adapter."""
        if which is not None and not isinstance(which, str):
            raise ValueError("prefix and prompt tuning do not support mixed batches; select one adapter by its name")
        selection = super().select(which, **settings)
        self._without.close()
        model: Any = self.model
        if which is None:
            self._without.enter_context(model.disable_adapter())
        else:
            model.active_adapter = which
        return selection

    def forget(self, name: str) -> None:
        """Always raises ValueError: such an adapter cannot be removed."""
        raise ValueError(
            f"adapter {name!r}: prefix and prompt tuning cannot be removed from a model; load the base model again"
        )


def attach(model: nn.Module, method: Prompting, *, name: str = "default") -> Prompts:
    """Add a new, selected adapter of virtual tokens; everything else is frozen.

    Use the adapter's `model` from then on. Raises ValueError if PEFT is not installed, and for a quantized base model,
    because PEFT's files cannot record the quantization.
    """
    peft = _peft(method)
    if storages_in(model):
        raise ValueError(
            f"{method.name}: PEFT's files cannot record how the base was quantized; use base.storage dense"
        )
    make = getattr(peft, method.peft_config)
    config = make(task_type="CAUSAL_LM", num_virtual_tokens=method.tokens, **method.peft_settings)
    with torch.random.fork_rng():
        torch.manual_seed(method.seed)
        made = _with(model, peft, config, name)
    adapter = _known(made, method, name).requires_grad_()
    state_of(made).select(name)
    return adapter  # type: ignore[return-value]


def load(model: nn.Module, folder: str | Path, *, name: str = "default", activate: bool = True) -> Prompts:
    """Load a frozen adapter of virtual tokens; select it unless `activate` is False.

    `model` is a base model or the `model` of another such adapter. Raises FormatError for a folder that is damaged or
    does not fit the model, and ValueError if PEFT is not installed.
    """
    folder = Path(folder)
    kind = prompting_of(folder)
    if kind is None:
        raise FormatError(f"{folder}: {CONFIG} describes neither prefix nor prompt tuning")
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
    """The method (prefix or prompt tuning) of a PEFT folder; None for any other folder."""
    if not (folder / CONFIG).is_file():
        return None
    values = read_json(folder / CONFIG)
    cls = KINDS.get(str(values.get("peft_type")))
    return None if cls is None else cls(tokens=values.get("num_virtual_tokens"))  # type: ignore[arg-type]


def is_prompted(model: nn.Module) -> bool:
    """Whether the model has adapters of virtual tokens."""
    return isinstance(getattr(model, "reparam_state", None), PromptState)


def base_of(folder: Path) -> str:
    """The base model that a PEFT folder names. Raises FormatError if it names none."""
    source = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not source:
        raise FormatError(f"{folder} does not name its base model; pass its folder or hub id with --base")
    return str(source)


def _with(model: nn.Module, peft: Any, config: Any, name: str) -> Any:
    """The `PeftModel` with a new adapter of this name; makes the `PeftModel` if `model` is not one yet."""
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
        return model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT causes it
        made = peft.get_peft_model(model, config, adapter_name=name)
    made.reparam_state = PromptState(made)
    made.register_forward_hook(_trim, with_kwargs=True)
    return made


def _known(model: Any, method: Prompting, name: str) -> Prompts:
    adapter = Prompts(name, method, model)
    state_of(model).adopt(adapter)
    return adapter


def _trim(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Drop the logits of the virtual tokens; those of the text, [B, T, vocabulary], remain."""
    ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    output.logits = output.logits[:, -ids.shape[1] :]
    return output


def _peft(method: Method) -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError(f"{method.name} needs PEFT, which is not installed: pip install 'reparam[peft]'") from None
    return peft
