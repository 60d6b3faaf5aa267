"""Prefix and prompt tuning: models of PEFT with the interface of an adapter.

`attach` and `load` return an adapter whose `model` is a `PeftModel`; use it in place of the base model.
`reparam.select` turns the virtual tokens on and off. The files are those of PEFT. They name the base model, but hold no
checksum of it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reparam.adapter.adapter import Adapter
from reparam.adapter.selection import AdapterState, Choice, Selection, state_of
from reparam.adapter.without_sites import fill_from, put_on, read_back
from reparam.core.checks import listed
from reparam.core.method import Method
from reparam.core.plain import decode
from reparam.errors import FormatError
from reparam.io import prompt_format
from reparam.io.files import check_holds_only, prompt_format_of
from reparam.io.native import pack_tensors, parse_tensors, read_bytes, read_json
from reparam.io.peft_formats import CONFIG
from reparam.io.peft_weights import LARGEST, WEIGHTS
from reparam.io.staged import staged_folder
from reparam.methods.prompts import Prefix, Prompt, Prompting
from reparam.sites.walk import storages_in

TaskType = Literal["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
KINDS: dict[str, type[Prompting]] = {"PREFIX_TUNING": Prefix, "PROMPT_TUNING": Prompt}


@dataclasses.dataclass(frozen=True)
class Held:
    """The keys of `adapter_config.json` that matter. What is None follows from the base model."""

    num_virtual_tokens: int
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    task_type: TaskType | None = None
    base_model_name_or_path: str | None = None

    def check(self, kind: type[Prompting], embeddings: Tensor, file: Path) -> None:
        """Raise FormatError for counts below 1, and unless the trained values have the shape that the counts give."""
        counts = {key: value for key, value in dataclasses.asdict(self).items() if isinstance(value, int)}
        for key, value in counts.items():
            if value < 1:
                raise FormatError(f"{file}: {key}: expected at least 1, found {value}")
        rows, columns = self.num_virtual_tokens, self.token_dim
        if kind is Prompt:
            rows *= self.num_transformer_submodules or 1
        elif columns is not None:
            columns = None if self.num_layers is None else 2 * self.num_layers * columns
        shape = list(embeddings.shape)
        if len(shape) != 2 or shape[0] != rows or columns not in (None, shape[1]):
            wanted = f"[{rows}, {'any number' if columns is None else columns}]"
            raise FormatError(
                f"{file}: the weights hold prompt_embeddings {shape}, expected {wanted} for these settings"
            )


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
        check_holds_only(Path(folder), (CONFIG, WEIGHTS, prompt_format.FILE))
        model: Any = self.model
        tensors = {"prompt_embeddings": model.get_prompt_embedding_to_save(self.name)}
        if not torch.isfinite(tensors["prompt_embeddings"]).all():
            raise ValueError(f"adapter {self.name!r}: NaN or infinity in prompt_embeddings; not saved")
        config = copy.copy(model.peft_config[self.name])
        config.inference_mode = True
        with staged_folder(folder, owned=True) as staging:
            config.save_pretrained(staging)
            if self.prompt_format is not None:
                (staging / prompt_format.FILE).write_bytes(self.prompt_format.content())
            (staging / WEIGHTS).write_bytes(pack_tensors(tensors, metadata={"format": "pt"}))

    @torch.no_grad()
    def fill(self, folder: Path) -> None:
        """Copy the saved values into this adapter. Raises FormatError for a damaged file and for other shapes."""
        own: Tensor = self.shared.embedding.weight  # type: ignore[union-attr, assignment]
        value = _embeddings(folder)
        if value.shape != own.shape:
            sizes = f"{list(value.shape)}, expected {list(own.shape)} for this model"
            raise FormatError(f"{folder / WEIGHTS}: prompt_embeddings is {sizes}")
        if own.is_meta:
            raise FormatError(
                f"{folder}: this model is on the device 'meta', which holds no values, so the adapter's values would "
                f"be lost; load the base's weights first"
            )
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
    held = held_by(folder)
    held.check(type(kind), _embeddings(folder), folder / CONFIG)
    peft = _peft(kind)
    config = getattr(peft, kind.peft_config)(**dataclasses.asdict(held), inference_mode=True)
    made = _with(model, peft, config, name)
    adapter = _known(made, kind, name)
    adapter.fill(folder)
    adapter.prompt_format = prompt_format_of(folder)
    adapter.requires_grad_(False)
    state = state_of(made)
    with state.select(name):
        _check_forward(made, folder)
    if activate:
        state.select(name)
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
    if cls is None:
        return None
    try:
        return cls(tokens=held_by(folder).num_virtual_tokens)
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"{folder / CONFIG}: num_virtual_tokens: {error}") from None


def held_by(folder: Path) -> Held:
    """What a PEFT folder of virtual tokens says. Raises FormatError for values of a wrong type."""
    values, fields = read_json(folder / CONFIG), {field.name for field in dataclasses.fields(Held)}
    if values.get("modules_to_save"):
        raise FormatError(f"{folder / CONFIG}: modules_to_save: not supported beside virtual tokens")
    return decode(Held, {key: value for key, value in values.items() if key in fields}, folder / CONFIG)


def is_prompted(model: nn.Module) -> bool:
    """Whether the model has adapters of virtual tokens."""
    return isinstance(getattr(model, "reparam_state", None), PromptState)


def base_of(folder: Path) -> str:
    """The base model that a PEFT folder names. Raises FormatError if it names none."""
    source = held_by(folder).base_model_name_or_path
    if not source:
        raise FormatError(f"{folder} does not name its base model; pass its folder or hub id with --base")
    return source


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


def _embeddings(folder: Path) -> Tensor:
    """The trained values in the folder. Raises FormatError if the file is damaged or holds other tensors."""
    found = parse_tensors(read_bytes(folder / WEIGHTS, most=LARGEST), folder / WEIGHTS)
    if found.keys() != {"prompt_embeddings"}:
        raise FormatError(f"{folder / WEIGHTS}: expected prompt_embeddings alone, found {listed(list(found))}")
    return found["prompt_embeddings"]


@torch.no_grad()
def _check_forward(model: Any, folder: Path) -> None:
    """Raise FormatError if the virtual tokens do not fit the model: the keys and values of a prefix have its sizes."""
    if getattr(model.config, "is_encoder_decoder", False):
        return  # needs inputs for both parts
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise FormatError(f"{folder}: these virtual tokens do not fit this model: {first}") from error


def _known(model: Any, method: Prompting, name: str) -> Prompts:
    adapter = Prompts(name, method, model)
    state_of(model).adopt(adapter)
    return adapter


def _trim(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Drop the logits of the virtual tokens; those of the text, [B, T, vocabulary], remain.

    TRL's outputs for preference tuning have none.
    """
    if "logits" not in output:
        return output
    ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    output.logits = output.logits[:, -ids.shape[1] :]
    return output


def _peft(method: Method) -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError(f"{method.name} needs PEFT, which is not installed: pip install 'reparam[peft]'") from None
    return peft
