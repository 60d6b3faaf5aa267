"""Where trials run: one after the other in this process, or on a Ray cluster that is there already."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from reparam.compare.trial import Outcome, Trial, perform

Late = Callable[[], bool]
"""Whether no further trial may start."""
Workers = Callable[[Sequence[Trial], Late], Iterator[Outcome]]
"""Performs trials and gives what came of them as they end, without those that it was too late for."""

NAMES = ("here", "ray")


def workers(name: str) -> Workers:
    """The workers of this name. Raises ValueError for an unknown one, and where Ray is missing or has no cluster."""
    if name == "here":
        return here
    if name == "ray":
        return _on_ray()
    raise ValueError(f"--workers {name!r}: expected one of {', '.join(NAMES)}")


def here(trials: Sequence[Trial], late: Late) -> Iterator[Outcome]:
    """One after the other."""
    for trial in trials:
        if late():
            return
        yield perform(trial)


def _on_ray() -> Workers:
    """On the cluster of RAY_ADDRESS, or the one on this machine; every trial gets a CPU, and a GPU where there are any.

    The output folder and all files of the plan must be the same, by the same paths, on all of its machines.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--workers ray needs Ray, which is not installed: pip install 'reparam[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False)
        except ConnectionError:
            raise ValueError(
                "--workers ray: no Ray cluster is running here; start one with `ray start --head`, or name one in the "
                "environment variable RAY_ADDRESS"
            ) from None
    resources = ray.cluster_resources()
    slots = int(resources.get("GPU", 0)) or int(resources["CPU"])
    perform_there = ray.remote(num_cpus=1, num_gpus=1 if resources.get("GPU") else 0)(_perform)

    def run(trials: Sequence[Trial], late: Late) -> Iterator[Outcome]:
        waiting = list(trials)
        running: list[Any] = []
        while waiting or running:
            while waiting and len(running) < slots and not late():
                running.append(perform_there.remote(dataclasses.asdict(waiting.pop(0))))
            if not running:
                return
            ended, running = ray.wait(running, num_returns=1)
            try:
                yield Outcome(**ray.get(ended[0]))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None

    return run


def _perform(trial: dict[str, Any]) -> dict[str, Any]:
    """`perform` on plain values, which pass between machines whatever Python runs there."""
    return dataclasses.asdict(perform(Trial(**trial)))
