"""Run trials one after the other in this process, or in parallel on a running Ray cluster."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from reparam.compare.trial import Outcome, Trial, perform

Late = Callable[[], bool]
"""Returns whether the time is up, so that no further trial may start."""
Workers = Callable[[Sequence[Trial], Late], Iterator[Outcome]]
"""Performs trials and yields each outcome when its trial ends; starts no further trial once `Late` returns True."""

NAMES = ("here", "ray")


def workers(name: str) -> Workers:
    """Return the workers with this name, one of `NAMES`.

    Raises ValueError for an unknown name and, for "ray", if Ray is not installed or no cluster is running.
    """
    if name == "here":
        return here
    if name == "ray":
        return _on_ray()
    raise ValueError(f"--workers {name!r}: expected one of {', '.join(NAMES)}")


def here(trials: Sequence[Trial], late: Late) -> Iterator[Outcome]:
    """Perform the trials one after the other in this process."""
    for trial in trials:
        if late():
            return
        yield perform(trial)


def _on_ray() -> Workers:
    """Workers on the Ray cluster at RAY_ADDRESS, or on this machine's.

    Each trial gets one CPU and, if the cluster has GPUs, one GPU. All machines of the cluster must have the output
    folder and the plan's files at the same paths.
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
                "--workers ray: no Ray cluster is running on this machine; start one with `ray start --head`, or set "
                "the environment variable RAY_ADDRESS to the address of another one"
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
    """Run `perform` on plain values, which Ray can send between machines with different Python versions."""
    return dataclasses.asdict(perform(Trial(**trial)))
