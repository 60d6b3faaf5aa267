"""Trials on a Ray cluster: results equal those of this process, and errors are passed on."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models import save_base

from reparam.compare import workers as workers_
from reparam.compare.trial import Trial, perform, trial
from reparam.compare.workers import Workers, workers
from reparam.errors import ConfigError, Stopped
from reparam.train.config import resolve

TASK = Path(__file__).parents[2] / "assets" / "tasks" / "signatures"


@pytest.fixture(scope="module")
def on_ray() -> Iterator[Workers]:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield workers("ray")
    ray.shutdown()


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    save_base(tmp_path / "model", tie_word_embeddings=True)
    files = {}
    for side, count in (("train", 20), ("valid", 4)):
        files[side] = tmp_path / f"{side}.jsonl"
        files[side].write_text("\n".join((TASK / f"{side}.jsonl").read_text().splitlines()[:count]) + "\n")
    return {
        "base.path": str(tmp_path / "model"),
        "data.train": str(files["train"]),
        "data.valid": str(files["valid"]),
        "run.max_steps": 2,
        "run.batch_size": 2,
    }


def made(settings: dict[str, Any], place: Path, rates: tuple[float, ...]) -> list[Trial]:
    return [
        trial("lora", resolve(None, {**settings, "optim.learning_rate": rate}), place, tuning=True, stamp="")
        for rate in rates
    ]


@pytest.mark.timeout(600)
def test_ray_gives_what_this_process_gives_and_its_errors_too(
    on_ray: Workers, settings: dict[str, Any], tmp_path: Path
) -> None:
    rates = (0.001, 0.01, 0.1)
    there = list(on_ray(made(settings, tmp_path / "there", rates), lambda: False))
    here = [perform(one) for one in made(settings, tmp_path / "here", rates)]
    assert {o.rate: o.after for o in there} == {o.rate: o.after for o in here}
    assert list(on_ray(made(settings, tmp_path / "late", rates), lambda: True)) == []
    broken = [dataclasses.replace(one, config="[run]\nstepz = 1\n") for one in made(settings, tmp_path / "no", (0.5,))]
    with pytest.raises(ConfigError, match=r"unknown key run.stepz"):
        list(on_ray(broken, lambda: False))


def test_workers_that_do_not_exist_are_named() -> None:
    assert workers("here") is workers_.here
    with pytest.raises(ValueError, match="expected one of here, ray"):
        workers("clouds")


def test_a_signal_passes_between_processes() -> None:
    again = pickle.loads(pickle.dumps(Stopped(15)))
    assert (again.number, str(again)) == (15, "stopped by SIGTERM")
