"""A loaded adapter trains alone, whatever the way in, and a run can go on from a finished adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, llama
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import reparam

ROWS = [{"input_ids": row, "labels": row} for row in IDS]


def saved(folder: Path, format: str) -> Path:
    """A LoRA with an effect, in a folder."""
    adapter = reparam.attach(llama(), reparam.LoRA(r=2), targets="attention")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    adapter.save(folder, format=format)
    return folder


def train(model: nn.Module, folder: Path) -> None:
    arguments = TrainingArguments(
        str(folder), max_steps=3, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    Trainer(model, arguments, train_dataset=ROWS).train()  # type: ignore[arg-type]


def base_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".updates." not in name}


@pytest.mark.parametrize("storage", ["dense", "nf4"])
@pytest.mark.parametrize("format", ["reparam", "peft"])
def test_a_stock_trainer_moves_the_loaded_adapter_and_nothing_else(format: str, storage: str, tmp_path: Path) -> None:
    model = llama()
    if storage != "dense":
        reparam.quantize(model, storage)
    adapter = reparam.load(model, saved(tmp_path / "a", format), check_base=storage == "dense", trainable=True)
    base = base_of(model)
    before = [p.detach().clone() for p in adapter.parameters()]
    train(model, tmp_path / "out")
    assert all(torch.equal(base[name], tensor) for name, tensor in base_of(model).items())
    assert not any(torch.equal(p, old) for p, old in zip(adapter.parameters(), before, strict=True))


def test_a_peft_export_after_training_on_has_the_same_outputs_on_the_true_base(tmp_path: Path) -> None:
    model = llama()
    adapter = reparam.load(model, saved(tmp_path / "a", "reparam")).requires_grad_()
    train(model, tmp_path / "out")
    adapter.save(tmp_path / "peft", format="peft")
    from peft import PeftModel

    judge = PeftModel.from_pretrained(llama(), str(tmp_path / "peft")).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=IDS).logits, judge(input_ids=IDS).logits)


def test_a_frozen_adapter_ends_the_run_of_a_trainer(tmp_path: Path) -> None:
    model = llama()
    reparam.load(model, saved(tmp_path / "a", "reparam"))
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises((RuntimeError, ValueError), match=r"does not require grad|empty parameter list"):
        train(model, tmp_path / "out")


def test_bind_refuses_an_optimizer_that_would_train_the_base(tmp_path: Path) -> None:
    model = llama()
    adapter = reparam.load(model, saved(tmp_path / "a", "reparam"), trainable=True)
    adapter.bind(torch.optim.SGD(model.parameters(), lr=0.1))  # what is frozen in it stays as it is
    model.model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"would also train 1 parameter of the base model \(first: in model.norm\)"):
        adapter.bind(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"16 parameters are not in the optimizer"):
        adapter.bind(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))


def settings(base: str, rows: str, output: Path, **more: Any) -> dict[str, Any]:
    common = {"base.path": base, "data.train": rows, "data.score_rows": 1, "run.max_steps": 3, "run.batch_size": 2}
    return {**common, "run.output": str(output), **more}


@pytest.mark.parametrize("format", ["reparam", "peft"])
def test_a_run_goes_on_from_a_finished_adapter(base: str, rows: str, tmp_path: Path, format: str) -> None:
    from io import StringIO

    from rich.console import Console

    from reparam.hf.models import load_base
    from reparam.train.config import resolve
    from reparam.train.run import train as run
    from reparam.train.show import Show

    model = load_base(base)
    adapter = reparam.attach(model, reparam.DoRA(r=2), targets="attention")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.02)
    adapter.save(tmp_path / "first", format=format)
    show = Show(Console(file=StringIO()))
    start = {"adapter.start": str(tmp_path / "first"), "optim.learning_rate": 1e-9}
    run(resolve(None, settings(base, rows, tmp_path / "out", **start)), show=show)
    second = reparam.load(load_base(base), tmp_path / "out" / "adapter")
    assert second.method.name == "dora"
    for one, other in zip(adapter.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    wrong = start | {"method.name": "bitfit"}
    with pytest.raises(reparam.ConfigError, match=r"adapter.start: .* has the method DoRA"):
        run(resolve(None, settings(base, rows, tmp_path / "out2", **wrong)), show=show)
    with pytest.raises(reparam.ConfigError, match="leave out the other keys of"):
        run(resolve(None, settings(base, rows, tmp_path / "out2", **start, **{"adapter.bias": True})), show=show)
