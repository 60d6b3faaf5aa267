"""The Trainer: a resumed run equals one that was never stopped, and nothing that stops a run does harm."""

import gc
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import EarlyStoppingCallback, LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from reparam.errors import DiskFull, NotFinite, RunLocked, StateError
from reparam.train.checkpoint import RunLock, newest, verify
from reparam.train.trainer import Trainer

ROWS, BATCH, ACCUMULATION = 10, 2, 2  # 5 batches and 3 steps an epoch, the last of them short
POISON = 63  # a token that no row holds


@pytest.fixture(scope="module", autouse=True)
def _short_collections():
    # transformers collects garbage at every start of training: most of the time here, over objects of the imports.
    gc.freeze()
    yield
    gc.unfreeze()


def tiny(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=0.3,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def rows(count: int = ROWS) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(5)
    made = []
    for index in range(count):
        ids = torch.randint(0, POISON, (4 + index % 5,), generator=draw).tolist()
        made.append({"input_ids": ids, "labels": [-100, *ids[1:]], "row": index, "unused": "text"})
    return made


def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in batch)

    def pad(key: str, value: int) -> Tensor:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in batch])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch])
    kept = torch.tensor([row["row"] for row in batch])
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "attention_mask": mask, "row": kept}


class At(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.act()


def send(*numbers: signal.Signals) -> Callable[[], None]:
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


def trainer(
    run: Path,
    *,
    model: LlamaForCausalLM | None = None,
    data: list[dict[str, Any]] | None = None,
    write: Callable[[Path], object] = lambda folder: None,
    row_names: Any = None,
    extra_loss: Callable[[], Tensor | None] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> Trainer:
    """A trainer of all of a tiny model; `write` also runs at each save."""
    model = model or tiny()
    defaults = {
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": 7,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "save_steps": 100,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "per_device_eval_batch_size": 4,
    }

    def save(folder: Path) -> None:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
        write(folder)

    return Trainer(
        model,
        TrainingArguments(output_dir=str(run), **(defaults | settings)),
        train_dataset=rows() if data is None else data,
        eval_dataset=rows(6),
        data_collator=collate,
        save_trained=save,
        load_trained=lambda folder: model.load_state_dict(load_file(folder / "model.safetensors")),
        callbacks=callbacks,
        row_names=row_names,
        extra_loss=extra_loss,
    )


def history(state: Any) -> list[dict[str, float]]:
    """The log without what depends on the clock, and without the summary of a call of `train`."""
    entries = [entry for entry in state.log_history if "train_runtime" not in entry]
    return [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in entries]


def weights(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- a resumed run equals one that was never stopped

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


# ---- what is refused


def saved(run: Path, **settings: Any) -> Path:
    """A run that stopped at step 2."""
    trainer(run, **settings, callbacks=[At(2, send(signal.SIGTERM))]).train()
    return run / "checkpoint-2"


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
    for part in ("training rows was 10 and is 20", "train_batch_size was 2 and is 1", "data_seed was 42 and is 3"):
        assert part in str(caught.value)


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="already holds checkpoint-2 of another run"):
        trainer(tmp_path).train()


def test_a_path_to_resume_from(tmp_path):
    trainer(tmp_path, save_steps=2, max_steps=4).train()
    with pytest.raises(ValueError, match=r"checkpoint-4 would stay the newest"):
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


# ---- checkpoints


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
        with pytest.raises(ValueError, match="a folder of its own"):
            run.save_model(folder)


def test_a_full_disk_ends_the_run_with_the_old_checkpoint_intact(tmp_path):
    def grow(folder: Path) -> None:
        if run.state.global_step > 2:
            (folder / "large").write_bytes(bytes(1 << 21))

    run = trainer(tmp_path, save_steps=2, write=grow)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
    try:
        with pytest.raises(DiskFull, match=r"checkpoint-4 .*the old one, checkpoint-2, is intact"):
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint-2"]
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 7


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step(tmp_path, number):
    before = signal.getsignal(number)
    run = trainer(tmp_path, callbacks=[At(3, send(number, signal.SIGTERM))])
    run.train()
    assert run.state.global_step == 3
    assert verify(tmp_path / "checkpoint-3") == []
    assert signal.getsignal(number) == before


def test_a_second_interrupt_ends_it_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run = trainer(tmp_path, save_steps=2, callbacks=[At(4, send(signal.SIGINT, signal.SIGINT))])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.interrupted == signal.SIGINT
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint-2"]
    assert signal.getsignal(signal.SIGINT) == before
    with RunLock(tmp_path):
        pass


HERE = ":".join(str(Path(__file__).parents[1] / part) for part in ("", "helpers", "conformance", "train"))
CHILD = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1].split(":")
import test_trainer as t

class Tell(t.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            print("training", flush=True)
            time.sleep(2)

def block(staged):  # in the middle of the second save
    if run.state.global_step == 4:
        print("saving", flush=True)
        time.sleep(60)

run = t.trainer(Path(sys.argv[2]) / "terminated", callbacks=[Tell()])
run.train()
print(run.interrupted.name, flush=True)
run = t.trainer(Path(sys.argv[2]) / "killed", save_steps=2, write=block)
run.train()
"""


def wait_for(process: "subprocess.Popen[str]", word: str) -> None:
    for line in process.stdout:
        if line.strip() == word:
            return
    pytest.fail(process.stderr.read())


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folders of a run that was terminated and one that was killed while saving, in a process of their own."""
    folder = tmp_path_factory.mktemp("ended")
    command = [sys.executable, "-c", CHILD, HERE, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(process, "training")
        process.terminate()
        wait_for(process, "SIGTERM")
        wait_for(process, "saving")
        with pytest.raises(RunLocked, match=f"process {process.pid} "):
            trainer(folder / "killed").train(resume_from_checkpoint=True)
    finally:
        process.kill()
        process.communicate()
    return folder


def test_a_run_killed_in_the_middle_of_a_save_goes_on_from_the_one_before(ended, tmp_path):
    assert len(list((ended / "killed").glob(".checkpoint-4.*"))) == 1
    assert [path.name for path in (ended / "killed").glob("checkpoint-*")] == ["checkpoint-2"]
    straight = trainer(tmp_path / "straight", save_steps=2)
    straight.train()
    second = trainer(ended / "killed", model=tiny(seed=7), save_steps=2)
    second.train(resume_from_checkpoint=True)
    assert same(weights(straight.model), weights(second.model))
    assert history(straight.state) == history(second.state)
    assert list((ended / "killed").glob(".checkpoint-*")) == []


def test_a_terminated_run_leaves_a_checkpoint(ended):
    found = newest(ended / "terminated")
    assert found.path.name == "checkpoint-2"
    assert found.skipped == []


# ---- several processes

RANKS = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(":")
import test_trainer as t

folder, second = Path(sys.argv[2]), os.environ["RANK"] == "1"
straight = t.trainer(folder / "straight", max_steps=4)
t.torch.manual_seed(second)  # so that each process drops out other units
straight.train()
stop = [t.At(2, t.send(t.signal.SIGTERM))] if second else []  # only one of them gets the signal
first = t.trainer(folder / "run", max_steps=4, callbacks=stop)
t.torch.manual_seed(second)
first.train()
assert (first.interrupted, first.state.global_step) == (t.signal.SIGTERM, 2)
again = t.trainer(folder / "run", model=t.tiny(seed=7), max_steps=4)
again.train(resume_from_checkpoint=True)
assert again.args.world_size == 2
assert t.same(t.weights(straight.model), t.weights(again.model))
assert t.history(straight.state) == t.history(again.state)
"""


def test_two_processes_stop_together_and_go_on(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    result = subprocess.run(
        [*command, HERE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    rng = json.loads((tmp_path / "run" / "checkpoint-4" / "rng.json").read_text())
    assert len(rng["tree"]) == 2


# ---- numbers that are not finite


def test_a_nan_loss_names_its_rows_and_changes_nothing(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = float("nan")
    data = rows()
    settings = {"save_steps": 1, "train_sampling_strategy": "sequential", "learning_rate": 1e-3}
    data[7]["input_ids"][2] = POISON  # step 2, its second micro-batch
    held: list[dict[str, Tensor]] = []
    run = trainer(
        tmp_path,
        model=model,
        data=data,
        row_names=[f"data.jsonl:{i + 1}" for i in range(ROWS)],
        callbacks=[At(2, lambda: held.append(weights(model)))],
        **settings,
    )
    with pytest.raises(NotFinite, match=r"the loss is nan at step 2 \(micro-batch 2 of 2\), in the rows") as caught:
        run.train()
    assert (caught.value.step, caught.value.rows) == (2, ["data.jsonl:7", "data.jsonl:8"])
    assert "the last good checkpoint is" in str(caught.value)
    assert "checkpoint-1." in str(caught.value)
    assert newest(tmp_path).path.name == "checkpoint-1"
    now = weights(model)
    assert all(torch.equal(now[key], held[0][key]) for key in now if "embed" not in key)


def test_a_nan_gradient_under_a_finite_loss_changes_nothing(tmp_path):
    model = tiny()
    held: list[dict[str, Tensor]] = []

    def penalty() -> Tensor:
        # The square root of 0: a finite value, and a gradient that is not.
        factor = 0.0 if run.state.global_step == 1 else 1.0
        return (model.lm_head.weight.square().sum() * factor).sqrt()

    run = trainer(
        tmp_path,
        model=model,
        extra_loss=penalty,
        row_names=lambda index: f"rows.jsonl:{index}",
        save_steps=1,
        train_sampling_strategy="sequential",
        callbacks=[At(2, lambda: held.append(weights(model)))],
    )
    with pytest.raises(NotFinite, match="the gradient is nan at step 2, in the rows") as caught:
        run.train()
    assert caught.value.rows == [f"rows.jsonl:{index}" for index in range(4, 8)]
    assert newest(tmp_path).path.name == "checkpoint-1"
    assert same(weights(model), held[0])


def test_without_rows_and_checkpoints_the_error_says_so(tmp_path):
    run = trainer(tmp_path, extra_loss=lambda: torch.tensor(float("inf")))
    run.data_collator = lambda batch: {key: value for key, value in collate(batch).items() if key != "row"}
    message = r"the penalty is inf at step 1 \(micro-batch 1 of 2\)\. .*there is no checkpoint yet"
    with pytest.raises(NotFinite, match=message) as caught:
        run.train()
    assert caught.value.rows == []


# ---- the penalty


@pytest.mark.parametrize("shared", [True, False], ids=["loss over all items", "loss per micro-batch"])
def test_the_penalty_moves_the_weights_and_not_the_reported_loss(tmp_path, shared):
    settings = {
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    }
    models = [tiny(), tiny()]
    start = models[0].lm_head.weight.detach().clone()
    runs = []
    for model, extra in zip(models, (None, lambda: 3 * models[1].lm_head.weight.square().sum() / 2), strict=True):
        model.accepts_loss_kwargs = shared
        runs.append(trainer(tmp_path / str(len(runs)), model=model, extra_loss=extra, **settings))
        runs[-1].train()
    assert history(runs[0].state)[0]["loss"] == history(runs[1].state)[0]["loss"]
    plain, pulled = (model.lm_head.weight.detach() for model in models)
    torch.testing.assert_close(pulled, plain - 0.1 * 3 * start, rtol=1e-5, atol=1e-6)
    assert not torch.equal(plain, start)


def test_the_penalty_is_no_part_of_evaluation(tmp_path):
    plain, extra = trainer(tmp_path / "a"), trainer(tmp_path / "b", extra_loss=lambda: torch.tensor(5.0))
    assert plain.evaluate()["eval_loss"] == extra.evaluate()["eval_loss"]
