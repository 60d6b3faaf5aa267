"""Checkpoints of the Trainer: which are kept, their contents, and a full disk."""

import os
import resource
from pathlib import Path

import pytest
from small_trainer import same, saved, tiny, trainer, weights

from reparam.errors import DiskFull


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    settings = {
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # so that the first is the best
    }
    seen = []
    run = trainer(tmp_path, **settings, write=lambda folder: seen.append(weights(run.model)))
    run.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-6",
        "checkpoint-7",
    ]
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert same(weights(run.model), seen[0])
    assert not same(seen[0], seen[1])


def test_a_moved_run_still_knows_its_best(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "max_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # so that the first is the best
    }
    first = trainer(tmp_path / "here", **settings)
    first.train()
    (tmp_path / "here").rename(tmp_path / "there")
    second = trainer(tmp_path / "there", model=tiny(seed=7), **settings)
    second.train(resume_from_checkpoint=True)
    assert second.state.best_model_checkpoint == str(tmp_path / "there" / "checkpoint-2")
    assert same(weights(first.model), weights(second.model))


def test_no_pickle_and_no_frozen_weights_are_written(tmp_path):
    checkpoint = saved(tmp_path)
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.json",
        "optimizer.safetensors",
        "progress.json",
        "rng.json",
        "rng.safetensors",
        "scheduler.json",
        "trainer_state.json",
    ]


def test_save_model_writes_what_is_trained_into_a_folder_of_its_own(tmp_path):
    run = trainer(tmp_path / "run")
    run.save_model(str(tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    for folder in (None, str(tmp_path / "run")):
        with pytest.raises(ValueError, match="other than the run folder"):
            run.save_model(folder)


def test_a_full_disk_ends_the_run_with_the_old_checkpoint_intact(tmp_path):
    def grow(folder: Path) -> None:
        if run.state.global_step > 2:
            (folder / "large").write_bytes(bytes(1 << 21))

    run = trainer(tmp_path, save_steps=2, write=grow)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
    try:
        with pytest.raises(DiskFull, match=r"checkpoint-4 .*checkpoint-2 is intact"):
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint-2"]
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 7
