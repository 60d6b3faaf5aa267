"""What the Trainer refuses: checkpoints with parts missing, other rows, other settings, a folder in use."""

import json
import os

import pytest
from small_trainer import rows, same, saved, trainer, weights

from reparam.errors import RunLocked, StateError
from reparam.train.checkpoint import RunLock, newest


@pytest.mark.parametrize("name", ["rng.json", "optimizer.json", "scheduler.json", "trainer_state.json"])
def test_a_checkpoint_that_was_saved_without_a_part_is_refused(tmp_path, name):
    checkpoint = saved(tmp_path)
    (checkpoint / name).unlink()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["files"][name]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    fresh = trainer(tmp_path)
    before = weights(fresh.model)
    with pytest.raises(StateError, match=f"checkpoint-2 lacks {name}"):
        fresh.train(resume_from_checkpoint=True)
    assert same(before, weights(fresh.model))


def test_a_damaged_checkpoint_is_skipped_and_reported(tmp_path):
    trainer(tmp_path, save_steps=2, max_steps=4).train()
    os.truncate(tmp_path / "checkpoint-4" / "model.safetensors", 100)
    run = trainer(tmp_path, max_steps=5)
    run.train(resume_from_checkpoint=True)
    assert run.resumed.path.name == "checkpoint-2"
    [(path, reason)] = run.resumed.skipped
    assert path.name == "checkpoint-4"
    assert "model.safetensors has 100 bytes" in reason
    assert newest(tmp_path).path.name == "checkpoint-5"


def test_what_changes_the_order_of_the_rows_is_refused(tmp_path):
    saved(tmp_path)
    changed = trainer(tmp_path, data=rows(20), per_device_train_batch_size=1, seed=3)
    with pytest.raises(ValueError, match="order") as caught:
        changed.train(resume_from_checkpoint=True)
    for part in (
        "training rows was 10 and is now 20",
        "train_batch_size was 2 and is now 1",
        "data_seed was 42 and is now 3",
    ):
        assert part in str(caught.value)


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="already holds checkpoint-2 of another run"):
        trainer(tmp_path).train()


def test_a_path_to_resume_from(tmp_path):
    trainer(tmp_path, save_steps=2, max_steps=4).train()
    with pytest.raises(ValueError, match=r"checkpoint-4 is the newest"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match=r"checkpoint-9: it does not exist"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    run = trainer(tmp_path)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert run.state.global_step == 7


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(ValueError, match=r"holds no checkpoint to resume from$"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_second_run_on_the_folder_is_refused(tmp_path):
    with RunLock(tmp_path), pytest.raises(RunLocked, match=f"in use by process {os.getpid()}"):
        trainer(tmp_path).train()
    run = trainer(tmp_path, max_steps=1)
    with run.lock:
        run.train()
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"save_only_model": True, "ignore_data_skip": True}, "save_only_model.*ignore_data_skip"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "dataloader_persistent_workers"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "use_seedable_sampler"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"metric_for_best_model": "loss", "save_total_limit": 1}, "save_total_limit=1"),
    ],
)
def test_arguments_that_would_break_the_promises_are_refused(tmp_path, settings, named):
    with pytest.raises(ValueError, match=named):
        trainer(tmp_path, **settings)
