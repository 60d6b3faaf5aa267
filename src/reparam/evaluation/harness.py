"""The model `reparam` of EleutherAI's lm-evaluation-harness: a base model with an adapter, on its public tasks.

Importing this file registers the model, so it needs the harness: pip install 'reparam[lm-eval]'. The harness finds
models in its own registry alone, so `reparam lm_eval` imports this file and then runs the command of the harness.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from reparam.adapter.context import context, tasks_of
from reparam.core.checks import nearest
from reparam.hf.open import open_model
from reparam.hf.prompts import is_prompted

__all__ = ["HarnessModel", "cli_evaluate"]


@register_model("reparam")
class HarnessModel(HFLM):
    """A base model with an adapter, for the harness. Scores are those of its model `hf` with the same weights.

    Args:
        base: folder or hub id of the base model; by default, the adapter's files name it.
        adapter: folder of an adapter, reparam's or PEFT's, or of a training run; without it, the base alone.
        dtype: auto (as in the base's files), float32, bfloat16 or float16.
        storage: storage of the base's matrices; by default, the one that the adapter was trained on.
        task: name of the task, for an adapter with gates by task.
        device: such as cuda:0; by default the accelerator, if there is one.
        others: other arguments of the harness's model `hf`, such as batch_size and max_length.

    Raises ValueError if neither `base` nor `adapter` is given, for a task that the adapter does not have, and if an
    adapter with tasks gets none; FormatError and BaseError as `reparam.hf.open.open_model` does.
    """

    def __init__(
        self,
        base: str | None = None,
        adapter: str | None = None,
        *,
        dtype: str = "auto",
        storage: str | None = None,
        task: str | None = None,
        device: str | None = None,
        **others: Any,
    ) -> None:
        if unknown := others.keys() & {"pretrained", "peft", "tokenizer"}:
            names = {"pretrained": "base", "peft": "adapter"}
            instead = ", ".join(names[key] for key in sorted(unknown) if key in names) or "base"
            raise ValueError(f"--model_args: {', '.join(sorted(unknown))}: the model reparam takes {instead} instead")
        model, tokenizer, _ = open_model(base, adapter, dtype=dtype, storage=storage)
        chosen = device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
        model.to(chosen)
        self._held = contextlib.ExitStack()
        self._held.enter_context(_told(model, task))
        if is_prompted(model):
            others["batch_size"] = 1  # padding would stand between the virtual tokens and the text
        model.tie_weights = lambda *args, **settings: None  # type: ignore[assignment]  # the harness would tie untied ones
        super().__init__(pretrained=model, tokenizer=tokenizer, **others)

    def get_model_info(self) -> dict[str, Any]:
        """The number of parameters and the dtype; the harness looks for a commit on the hub, which does not exist."""
        return {
            "model_num_parameters": sum(p.numel() for p in self._model.parameters()),
            "model_dtype": self._model.dtype,
        }


def _told(model: Any, task: str | None) -> contextlib.AbstractContextManager[None]:
    """A context in which the adapter's gates know the task."""
    names = tasks_of(model)
    if task is None and names:
        raise ValueError(f"--model_args: the adapter depends on the task: add task=NAME, one of {', '.join(names)}")
    if task is None:
        return contextlib.nullcontext()
    if task not in names:
        known = (
            f"one of {', '.join(names)}{nearest(task, names)}" if names else "none, because the adapter has no tasks"
        )
        raise ValueError(f"--model_args: task={task}: expected {known}")
    return context(model, tasks=task)
