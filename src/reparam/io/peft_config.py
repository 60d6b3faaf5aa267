"""What each key of PEFT's `adapter_config.json` (LoraConfig of PEFT 0.21) means here: honored, or refused by name.

A key that changes what a trained adapter computes is in `Honored` or in `REFUSED`; `NEUTRAL` are the keys that do not.
A key in none of them comes from another release: it is refused unless its value is empty.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from reparam.core.plain import decode
from reparam.errors import FormatError

NEUTRAL = {
    # about the file, not the function
    "peft_type", "peft_version", "task_type", "auto_mapping", "revision", "inference_mode", "runtime_config",
    # told by the base: a Conv1D's matrix is [I, O]
    "fan_in_fan_out",
    # how training began, for the initializations that leave the base alone
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    # without effect unless a refused key is set
    "megatron_core", "qalora_group_size",
}  # fmt: skip
REFUSED = {
    "lora_bias": "a bias on B is not read",
    "trainable_token_indices": "single trained tokens are not read",
    "target_parameters": "LoRA on bare parameters (fused experts) is not read",
    "layer_replication": "it changes the layers of the base",
    "alora_invocation_tokens": "Activated LoRA depends on the tokens before it",
    "use_qalora": "QALoRA pools the inputs of A",
    "use_bdlora": "block-diagonal factors are not read",
    "kasa_config": "KaSA truncates the base",
    "arrow_config": "Arrow routes between several adapters",
    "velora_config": "VeLoRA keeps a projection with the factors",
    "monteclora_config": "MonteCLoRA samples its factors",
    "megatron_config": "Megatron's parallel layers are not supported",
    "ensure_weight_tying": "tied adapters are not read",
}
_NO_WEIGHT = "; it changes no weight, so that there is nothing to merge, sum or look at: generate and eval take it"
OTHERS = {  # what to do instead
    "PREFIX_TUNING": _NO_WEIGHT,
    "PROMPT_TUNING": _NO_WEIGHT,
    "XLORA": "; its experts are adapters of their own, over which a new router trains: --method xlora --method.experts",
    "POLY": "; train it here with --method poly, for one split",
}
# Initializations that change A and B only. Others move the base too, and PEFT does so again when it loads the file.
PLAIN_INITS = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")


@dataclasses.dataclass(frozen=True)
class Honored:
    """The keys that are read, with PEFT's defaults."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    bias: Literal["none", "lora_only", "all"] = "none"
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    base_model_name_or_path: str | None = None

    def site(self, path: str) -> bool:
        """PEFT's rule for which modules get factors (its `check_target_module_exists`), as far as paths tell."""
        targets, whole = self.target_modules, self.modules_to_save or []
        if _named(path, self.exclude_modules) or any(re.match(rf"(^|.*\.){m}($|\..*)", path) for m in whole):
            return False
        if isinstance(targets, str) and targets.lower() == "all-linear":
            return False  # no path tells whether it is linear
        if not _named(path, targets):
            return False
        layers = self.layers_to_transform
        if isinstance(targets, str) or path in (targets or ()) or layers is None or layers == []:
            return True
        indices = layers if isinstance(layers, list) else [layers]
        named = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in named] if named else [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for p in patterns if (match := re.match(p, path))), None)
        return found is not None and int(found[1]) in indices

    def whole(self, path: str) -> bool:
        """PEFT's rule for which modules are trained whole: the path ends so, in the middle of a name too."""
        return path.endswith(tuple(self.modules_to_save or ()))


def parse(config: Mapping[str, Any], file: Path) -> Honored:
    """The keys that count. Raises FormatError that names each key which cannot be honored."""
    fields = {field.name for field in dataclasses.fields(Honored)}
    problems = [f"{key} = {config[key]!r}: {why}" for key, why in REFUSED.items() if config.get(key)]
    problems += [
        f"{key} = {value!r}: unknown (peft_version {config.get('peft_version')!r}); take it out of the file if it does "
        f"not change what the adapter computes"
        for key, value in config.items()
        if value and key not in fields | NEUTRAL | REFUSED.keys()
    ]
    init = config.get("init_lora_weights", True)
    if str(init).lower() not in PLAIN_INITS:
        problems.append(
            f"init_lora_weights = {init!r}: it moved the base's weights when training began, so that these factors "
            f"alone are not the change; write the adapter again with PEFT's save_pretrained(..., "
            f"path_initial_model_for_weight_conversion=...)"
        )
    if problems:
        raise FormatError(f"{file}: " + "; ".join(problems))
    found = decode(Honored, {key: value for key, value in config.items() if key in fields}, file)
    if found.bias == "all":
        raise FormatError(
            f"{file}: bias = 'all': biases outside the sites are not read, only 'none' and 'lora_only' are"
        )
    _check_patterns(found, file)
    return found


def _check_patterns(config: Honored, file: Path) -> None:
    expressions = {
        key: list(getattr(config, key) or ()) for key in ("rank_pattern", "alpha_pattern", "modules_to_save")
    }
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(config, key)
        expressions[key] = [value] if isinstance(value, str) else []
    for key, patterns in expressions.items():
        for pattern in patterns:
            try:
                re.compile(f"({pattern})")
            except re.error as error:
                raise FormatError(f"{file}: {key}: {pattern!r} is not a regular expression: {error}") from None


def _named(path: str, names: str | list[str] | None) -> bool:
    """Whether PEFT finds `path` by these names: a regular expression for all of it, or paths and ends of paths."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith("." + name) for name in names or ())
