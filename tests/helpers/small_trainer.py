"""The Trainer on a whole tiny model with ten rows."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from reparam.train.trainer import Trainer

ROWS, BATCH, ACCUMULATION = 10, 2, 2  # 5 batches and 3 steps an epoch, the last of them short
POISON = 63  # a token that no row holds


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
    """A callback that calls a function when a step begins."""

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
    """A trainer of a whole tiny model; `write` is also called at each save."""
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
    """The log without times and without the summary of `train`."""
    entries = [entry for entry in state.log_history if "train_runtime" not in entry]
    return [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in entries]


def weights(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def saved(run: Path, **settings: Any) -> Path:
    """The folder of a run that stopped at step 2."""
    trainer(run, **settings, callbacks=[At(2, send(signal.SIGTERM))]).train()
    return run / "checkpoint-2"
