"""The keys of PEFT's `adapter_config.json` (LoraConfig of PEFT 0.21): supported, refused or ignored.

A key that changes the outputs of a trained adapter is in `Honored` (supported) or in `REFUSED`. The keys in `NEUTRAL`
do not change outputs and are ignored. Other keys come from another release of PEFT. They are refused unless their value
is empty or the default of the installed PEFT, in which a setting that is left alone changes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from reparam.core.expressions import expression
from reparam.core.plain import decode
from reparam.errors import FormatError

NEUTRAL = {
    # about the file, not the outputs
    "peft_type", "task_type", "auto_mapping", "revision", "inference_mode", "runtime_config",
    # known from the base: the matrix of a Conv1D is [I, O]
    "fan_in_fan_out",
    # initializations that do not change the base
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    # no effect unless a refused key is set
    "megatron_core", "qalora_group_size",
}  # fmt: skip
REFUSED = {
    "layer_replication": "replicated layers of the base are not supported",
    "alora_invocation_tokens": "Activated LoRA, which depends on the preceding tokens, is not supported",
    "use_qalora": "QALoRA, which pools the inputs of A, is not supported",
    "use_bdlora": "block-diagonal factors are not supported",
    "kasa_config": "KaSA, which truncates the base, is not supported",
    "arrow_config": "Arrow, which routes between several adapters, is not supported",
    "velora_config": "VeLoRA, which stores a projection with the factors, is not supported",
    "monteclora_config": "MonteCLoRA, which samples its factors, is not supported",
    "megatron_config": "Megatron's parallel layers are not supported",
}
_NO_WEIGHT = "; it changes no weights, so it cannot be merged, summed or inspected; use it with generate and eval"
OTHERS = {  # what to do instead
    "PREFIX_TUNING": _NO_WEIGHT,
    "PROMPT_TUNING": _NO_WEIGHT,
    "XLORA": "; read its expert adapters instead and train a new router: --method xlora --method.experts",
    "POLY": "; train such an adapter here with --method poly, for one split",
}
SWITCHES = ("use_rslora", "use_dora", "lora_bias")  # null means false
# Initializations that change only A and B. Others also change the base, and PEFT repeats that when it loads the file.
PLAIN_INITS = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")
_NUMBER = re.compile(r"(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Honored:
    """The supported keys, with PEFT's defaults."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    bias: Literal["none", "lora_only", "all"] = "none"
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    base_model_name_or_path: str | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    target_parameters: list[str] | None = None
    peft_version: str | None = None

    def site(self, path: str) -> bool:
        """Whether PEFT puts factors on this path, as `check_target_module_exists` decides; False for "all-linear"."""
        targets, whole = self.target_modules, self.modules_to_save or []
        if _named(path, self.exclude_modules):
            return False
        if any(expression(rf"(^|.*\.){m}($|\..*)").match(path) for m in whole):
            return False
        if isinstance(targets, str) and targets.lower() == "all-linear":
            return False  # a path does not show whether its module is linear
        if not _named(path, targets):
            return False
        layers = self.layers_to_transform
        if isinstance(targets, str) or path in (targets or ()) or layers is None or layers == []:
            return True
        indices = layers if isinstance(layers, list) else [layers]
        named = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        starts = [rf"(?:^|.*?\.){p}\." for p in named] if named else [r".*?\.[^.]*\."]
        found = next((index for start in starts if (index := _index(path, start)) is not None), None)
        return found is not None and found in indices

    def tokens(self, path: str) -> list[int]:
        """The ids of the tokens that train at this path."""
        found = self.trainable_token_indices
        if not isinstance(found, dict):
            return found or []
        return next((ids for name, ids in found.items() if path == name or path.endswith("." + name)), [])

    def ignored(self, path: str) -> bool:
        """Whether PEFT puts no factors on this path; False if that cannot be told from the path."""
        told = self.target_modules not in (None, [], "") and str(self.target_modules).lower() != "all-linear"
        return told and not self.site(path) and not self.parameter(path)

    def parameter(self, path: str) -> bool:
        """Whether `target_parameters` name the weight of the module at this path, or the stack that an expert is in."""
        holder, _, name = path.rpartition(".")
        stack = re.sub(r"\.\d+$", "", holder)
        return any(_named(found, self.target_parameters) for found in (f"{path}.weight", f"{stack}.{name}"))

    def whole(self, path: str) -> bool:
        """Whether PEFT trains the module at this path whole: the path ends with one of `modules_to_save`.

        As in PEFT, the match may begin in the middle of a name.
        """
        return path.endswith(tuple(self.modules_to_save or ()))


def parse(config: Mapping[str, Any], file: Path) -> Honored:
    """Decode the supported keys. Raises FormatError that names each unsupported key."""
    fields = {field.name for field in dataclasses.fields(Honored)}
    problems = [f"{key} = {config[key]!r}: {why}" for key, why in REFUSED.items() if not _empty(config.get(key))]
    unknown = {key: v for key, v in config.items() if not _empty(v) and key not in fields | NEUTRAL | REFUSED.keys()}
    usual = _defaults_of(str(config.get("peft_type"))) if unknown else {}
    version = config.get("peft_version")
    problems += [
        f"{key} = {value!r}: unknown key (peft_version {version!r}); install that release of peft, which tells whether "
        f"this is its default, or remove the key from the file if it does not change the adapter's outputs"
        for key, value in unknown.items()
        if key not in usual or type(usual[key]) is not type(value) or usual[key] != value
    ]
    init = config.get("init_lora_weights", True)
    if str(init).lower() not in PLAIN_INITS:
        problems.append(
            f"init_lora_weights = {init!r}: this initialization changed the base's weights, so the factors are not the "
            f"whole change; save the adapter again with PEFT's save_pretrained(..., "
            f"path_initial_model_for_weight_conversion=...)"
        )
    if problems:
        raise FormatError(f"{file}: " + "; ".join(problems))
    null = {key for key in SWITCHES if config.get(key, False) is None}
    found = decode(Honored, {key: value for key, value in config.items() if key in fields - null}, file)
    _check_patterns(found, file)
    return found


@functools.cache
def _defaults_of(peft_type: str) -> dict[str, Any]:
    """The settings of a new configuration of this type, as the installed PEFT writes them; empty without PEFT."""
    try:
        peft = importlib.import_module("peft")
        found = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]().to_dict()
        plain: dict[str, Any] = json.loads(json.dumps(found, default=lambda x: sorted(x) if isinstance(x, set) else ""))
    except Exception:  # an optional package, in any release: what it does not tell is unknown
        return {}
    return plain


def _check_patterns(config: Honored, file: Path) -> None:
    expressions = {
        key: list(getattr(config, key) or ()) for key in ("rank_pattern", "alpha_pattern", "modules_to_save")
    }
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(config, key)
        names = key == "layers_pattern" and isinstance(value, list)
        expressions[key] = [value] if isinstance(value, str) else list(value) if names else []
    for key, patterns in expressions.items():
        for pattern in patterns:
            try:
                expression(pattern)
                expression(f"({pattern})")  # flags may be at the start only
            except ValueError as error:
                raise FormatError(f"{file}: {key}: {error}") from None


def _named(path: str, names: str | list[str] | None) -> bool:
    """Whether PEFT matches `path` by a regular expression (a str), or by a list of paths and ends of paths."""
    if isinstance(names, str):
        return expression(names).fullmatch(path)
    return any(path == name or path.endswith("." + name) for name in names or ())


def _index(path: str, start: str) -> int | None:
    """The number in `path` that follows the first match of `start` with a number and a dot after it; else None."""
    ends = expression(start).ends(path)
    places = [place for place in range(len(path)) if ends >> place & 1]
    found = next((match for place in places if (match := _NUMBER.match(path, place))), None)
    return int(found[1]) if found else None


def _empty(value: Any) -> bool:
    """Whether a value sets nothing: null, false, zero or empty, or containers of these alone."""
    if isinstance(value, dict):
        return all(map(_empty, value.values()))
    return all(map(_empty, value)) if isinstance(value, list) else not value
