"""The Trainer: a resumed run equals one that was never stopped."""

import signal

import pytest
import torch
from small_trainer import At, history, same, send, tiny, trainer, weights
from transformers import EarlyStoppingCallback

from reparam.train.checkpoint import newest

PLANS = {
    "in an epoch": (2, {}),
    "in the second epoch": (5, {}),
    "at the end of an epoch": (3, {}),
    "at the last step": (7, {}),
    "log entries over several steps": (5, {"logging_steps": 3}),
    "evaluation by steps": (4, {"eval_strategy": "steps", "eval_steps": 2}),
    "evaluation and log by epoch, stopped in one": (
        4,
        {"eval_strategy": "epoch", "logging_strategy": "epoch", "save_strategy": "epoch"},
    ),
    "evaluation and log by epoch, stopped after one": (
        3,
        {"eval_strategy": "epoch", "logging_strategy": "epoch", "save_steps": 3},
    ),
    "without checkpoints": (4, {"save_strategy": "no"}),
    "best only": (
        4,
        {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "metric_for_best_model": "loss"},
    ),
    "rows ordered by length": (4, {"train_sampling_strategy": "group_by_length"}),
    "rows in order": (4, {"train_sampling_strategy": "sequential"}),
    "no accumulation": (6, {"gradient_accumulation_steps": 1}),
    "bf16 and activation checkpointing": (2, {"bf16": True, "activation_checkpointing": True, "max_steps": 4}),
    "noise on the embeddings": (2, {"neftune_noise_alpha": 5.0, "max_steps": 4}),
    "workers": (2, {"dataloader_num_workers": 1, "max_steps": 4}),
    "reduce on plateau": (
        3,
        {"eval_strategy": "steps", "eval_steps": 2, "lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0},
    ),
}


@pytest.mark.parametrize(("stop", "settings"), PLANS.values(), ids=PLANS)
def test_a_resumed_run_is_the_same_run(tmp_path, stop, settings):
    straight = trainer(tmp_path / "straight", **settings)
    straight.train()

    first = trainer(tmp_path / "run", **settings, callbacks=[At(stop, send(signal.SIGTERM))])
    first.train()
    assert first.interrupted == signal.SIGTERM
    assert first.state.global_step == stop
    assert newest(tmp_path / "run").path == tmp_path / "run" / f"checkpoint-{stop}"

    torch.manual_seed(99)  # whatever the process did before must not matter
    second = trainer(tmp_path / "run", model=tiny(seed=7), **settings)
    torch.manual_seed(98)
    second.train(resume_from_checkpoint=True)

    assert second.resumed.path == tmp_path / "run" / f"checkpoint-{stop}"
    assert second.interrupted is None
    assert same(weights(straight.model), weights(second.model))
    assert history(straight.state) == history(second.state)
    assert len(history(straight.state)) >= 2
    assert straight.lr_scheduler.state_dict() == second.lr_scheduler.state_dict()
    assert straight.state.epoch == second.state.epoch


def test_dropout_and_order_are_what_the_seed_says(tmp_path):
    # Without this the test above could pass with no randomness at all.
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        runs.append(trainer(tmp_path / str(number), seed=seed, max_steps=2))
        runs[-1].train()
    assert same(weights(runs[0].model), weights(runs[1].model))
    assert not same(weights(runs[0].model), weights(runs[2].model))


def test_several_interruptions(tmp_path):
    straight = trainer(tmp_path / "straight", logging_steps=4)
    straight.train()
    for number, stop in enumerate((1, 3, 5, None)):
        callbacks = [At(stop, send(signal.SIGINT))] if stop else []
        run = trainer(tmp_path / "run", logging_steps=4, model=tiny(seed=number), callbacks=callbacks)
        run.train(resume_from_checkpoint=number > 0)
    assert same(weights(straight.model), weights(run.model))
    assert history(straight.state) == history(run.state)


def test_early_stopping_counts_on(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
        "save_steps": 1,
        "learning_rate": 0.0,  # never better than the first
    }
    straight = trainer(tmp_path / "straight", **settings, callbacks=[EarlyStoppingCallback(4)])
    straight.train()
    first = trainer(tmp_path / "run", **settings, callbacks=[EarlyStoppingCallback(4), At(3, send(signal.SIGTERM))])
    first.train()
    second = trainer(tmp_path / "run", **settings, callbacks=[EarlyStoppingCallback(4)])
    second.train(resume_from_checkpoint=True)
    assert straight.state.global_step == second.state.global_step == 5


def test_a_complete_run_is_not_trained_further(tmp_path):
    first = trainer(tmp_path, max_steps=4)  # in the middle of an epoch
    first.train()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("checkpoint-*")}
    second = trainer(tmp_path, model=tiny(seed=7), max_steps=4)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4
    assert same(weights(first.model), weights(second.model))
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("checkpoint-*")}


def test_the_summary_is_about_the_steps_of_this_call(tmp_path):
    settings = {"logging_steps": 3, "max_steps": 6}
    losses = trainer(tmp_path / "straight", **(settings | {"logging_steps": 1}))
    losses.train()
    trainer(tmp_path / "run", **settings, callbacks=[At(4, send(signal.SIGTERM))]).train()
    result = trainer(tmp_path / "run", **settings).train(resume_from_checkpoint=True)
    expected = [entry["loss"] for entry in history(losses.state)][4:]
    assert result.training_loss == pytest.approx(sum(expected) / 2, rel=1e-5)
