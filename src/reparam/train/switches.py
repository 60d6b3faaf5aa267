"""Settings that other libraries write in another form, such as `bf16: true` for the precision bfloat16.

They are options of the command line and keys of the files that `reparam train --from` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reparam.errors import ConfigError

_Choices = dict[str, dict[str, Any]]
_ON, _OFF = ("true", "yes", "t", "y", "1", "on"), ("false", "no", "f", "n", "0", "off")

SWITCHES: dict[str, _Choices] = {
    "bf16": {"true": {"run.precision": "bfloat16"}, "false": {"run.precision": "float32"}},
    "fp16": {"false": {}},
    "load_in_4bit": {"true": {"base.storage": "nf4"}, "false": {}},
    "load_in_8bit": {"true": {"base.storage": "int8"}, "false": {}},
    "quantization_bit": {"4": {"base.storage": "nf4"}, "8": {"base.storage": "int8"}},
    "bnb_4bit_quant_type": {"nf4": {}},
    "use_peft": {"true": {}, "false": {"method.name": "full"}},
    "finetuning_type": {"lora": {}, "full": {"method.name": "full"}},
    "use_dora": {"true": {"method.name": "dora"}, "false": {}},
    "use_rslora": {"true": {"method.scaling": "rslora"}, "false": {}},
    "bias": {"none": {}, "lora_only": {"adapter.bias": True}},
    "use_gradient_checkpointing": {
        **{value: {"run.gradient_checkpointing": True} for value in ("true", "unsloth")},
        "false": {"run.gradient_checkpointing": False},
    },
    "use_loftq": {"false": {}},
    "train_on_inputs": {"true": {"data.loss_on": "all"}, "false": {}},
    "train_on_prompt": {"true": {"data.loss_on": "all"}, "false": {}},
    "mask_history": {"true": {"data.loss_on": "last"}, "false": {}},
    "assistant_only_loss": {"true": {"data.loss_on": "answers"}, "false": {"data.loss_on": "all"}},
    "completion_only_loss": {"true": {"data.loss_on": "answers"}, "false": {"data.loss_on": "all"}},
    "resume_from_checkpoint": {"true": {"run.resume": True}, "false": {"run.resume": False}},
    "do_train": {"true": {}},
    "stage": {"sft": {}, "dpo": {"run.objective": "dpo"}, "kto": {"run.objective": "kto"}},
    "rl": {
        **{name: {"run.objective": name} for name in ("dpo", "orpo", "kto")},
        "ipo": {"run.objective": "dpo", "prefer.loss_type": "ipo"},
    },
}
"""By name, the settings that each value stands for, by dotted key."""

_WHY = {
    "fp16": "float16 needs a scaled loss, which has no counterpart; use bf16, or leave both out for float32",
    "quantization_bit": "the storages have 4 bits (nf4) or 8 bits (int8)",
    "bnb_4bit_quant_type": "the only storage of 4 bits is nf4",
    "bias": "adapter.bias trains the biases of the adapted modules",
    "use_loftq": "LoRA starts with A at random and B at zero",
    "finetuning_type": "set method.name to one of reparam's methods",
    "resume_from_checkpoint": "a run goes on from the newest complete checkpoint in its output folder; give "
    "that folder as run.output",
    "do_train": "to score a model without training, use `reparam eval`",
    "stage": "reward models, PPO and pre-training have no counterpart; rewards from a function are --objective grpo",
    "rl": "for rewards from a function, use --objective grpo with --reward FILE.py:function",
}


def truth(value: Any) -> bool | None:
    """Whether a value means true or false, as true, "True", "yes" or "1" do; None if it is neither.

    >>> truth("True"), truth("no"), truth("maybe")
    (True, False, None)
    """
    text = str(value).strip().lower()
    return True if text in _ON else False if text in _OFF else None


def switched(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, by dotted key, that switches with their values stand for.

    Raises ConfigError, with all problems, for values that have no counterpart, and if two switches contradict each
    other.

    >>> switched({"bf16": "True", "load_in_4bit": True})
    {'run.precision': 'bfloat16', 'base.storage': 'nf4'}
    """
    found: dict[str, Any] = {}
    origin: dict[str, str] = {}
    problems = []
    for name, value in given.items():
        settings = _meant(name, value)
        if settings is None:
            known = " or ".join(SWITCHES[name])
            why = f"; {_WHY[name]}" if name in _WHY else ""
            problems.append(f"{name}: {value!r}: expected {known}{why}")
            continue
        for key, setting in settings.items():
            if found.get(key, setting) != setting:
                problems.append(
                    f"{origin[key]} sets {key} to {found[key]}, and {name} sets it to {setting}; leave one of them out"
                )
            found[key], origin[key] = setting, name
    if problems:
        raise ConfigError("; ".join(problems))
    return found


def _meant(name: str, value: Any) -> dict[str, Any] | None:
    choices = SWITCHES[name]
    if text := choices.get(str(value).strip().lower()):
        return text
    meant = truth(value)
    return choices.get(str(value).strip().lower() if meant is None else str(meant).lower())
