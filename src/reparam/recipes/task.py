"""Check the option --task against the adapter before the base model is loaded."""

from __future__ import annotations

from reparam.hf.prompts import prompting_of
from reparam.io import files
from reparam.io.files import adapter_folder


def check_task(task: str | None, adapter: str | None) -> None:
    """Raise ValueError if a task is given and the adapter's gates do not depend on tasks, or if there is no adapter.

    `adapter` is the folder of an adapter or of its training run.
    """
    if task is None:
        return
    if adapter is None:
        raise ValueError(f"--task {task}: a base model without an adapter has no tasks; leave --task out")
    folder = adapter_folder(adapter)
    method = prompting_of(folder) or files.read(folder).method
    if method.known_tasks is None or len(method.known_tasks) < 2:
        raise ValueError(
            f"--task {task}: the adapter in {folder} ({method.name}) has no tasks, so its outputs do not depend on "
            f"one; leave --task out"
        )
