"""Running and training with torch.compile, gradient checkpointing, Trainer, 16-bit bases and autocast."""

from collections import OrderedDict
from pathlib import Path

import models
import pytest
import torch
from cases import (
    FAMILIES,
    FIRST,
    SETTINGS,
    Family,
    attach,
    base_of,
    error,
    has_factors,
    move,
    starts_exactly,
    storages_in_turn,
    store,
    whole_models,
)
from models import IDS, logits
from sampled import FULL
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import reparam
from reparam.core.method import Method

LLAMA = FAMILIES["llama"]
first = pytest.mark.parametrize("method", FIRST)


def gradients(model: nn.Module, adapter: reparam.Adapter) -> dict[str, Tensor]:
    """Gradients of the loss, by parameter. Dropout uses the same random numbers at every call."""
    torch.manual_seed(0)
    model.zero_grad()
    models.loss(model).backward()
    assert [name for name, p, _ in adapter.named_parameters() if p.grad is None] == []
    return {name: p.grad.clone() for name, p, _ in adapter.named_parameters()}  # type: ignore[union-attr]


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of any gradient."""
    return max(error(found[name], expected[name]) for name in expected)


def check_compiled(model: nn.Module, x: Tensor, adapter: reparam.Adapter) -> None:
    """Check the model under dynamo and AOT autograd, without the slow code generator."""
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs, found = [], []
    for run in (model, compiled):
        y = run(x)
        y = y if isinstance(y, Tensor) else y.logits
        outputs.append(y)
        found.append(torch.autograd.grad(y.square().sum(), adapter.parameters()))
    assert error(outputs[1], outputs[0]) < 1e-5
    assert max(error(f, e) for e, f in zip(*found, strict=True)) < 1e-4
    torch.compiler.reset()


@storages_in_turn(0)
def test_layers_compile_without_graph_breaks(storage: str, method: Method) -> None:
    model = nn.Sequential(OrderedDict(wte=nn.Embedding(9, 12), q_proj=nn.Linear(12, 8), c_attn=Conv1D(6, 8)))
    store(model, ["wte", "q_proj", "c_attn"], storage)
    adapter = attach(model, method, ["q_proj", "c_attn"], ["wte"])
    move(adapter, 1)
    check_compiled(model.eval(), torch.randint(9, (2, 5)), adapter)


@pytest.mark.parametrize("method", FIRST if FULL else FIRST[::7])
def test_a_model_compiles_without_graph_breaks(method: Method) -> None:
    """With the hooks on the model. Every method is compiled on layers above."""
    model = models.llama(num_hidden_layers=1)
    adapter = LLAMA.attach(model, method)
    move(adapter, 1)
    check_compiled(model, IDS, adapter)


@whole_models(9)
def test_checkpointed_gradients_are_the_plain_ones(family: Family, storage: str, method: Method) -> None:
    model, adapter = family.adapted(method, storage, seed=1)
    model.train()
    expected = gradients(model, adapter)
    for reentrant in (False, True):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
        assert worst(gradients(model, adapter), expected) < 1e-5, f"use_reentrant={reentrant}"


@storages_in_turn(1)
def test_trainer_trains_it(storage: str, method: Method, tmp_path: Path) -> None:
    """With reparam's hooks on the Trainer's optimizer."""
    model, adapter = LLAMA.adapted(method, storage)
    before = base_of(model)
    start = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.bind(optimizer)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        lr_scheduler_type="constant",
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert models.same(base_of(model), before)
    assert [name for name, p, _ in adapter.named_parameters() if torch.equal(p, start[name])] == []


@whole_models(10)
def test_a_16_bit_base_trains_with_masters_in_float32(family: Family, storage: str, method: Method) -> None:
    """In bfloat16 or float16, by turns of the settings; in the full suite, in both."""
    turn = [param.values[0] for param in SETTINGS].index(method)
    for dtype in (torch.bfloat16, torch.float16) if FULL else ((torch.bfloat16, torch.float16)[turn // 2 % 2],):
        check_16_bits(family, storage, method, dtype)


def check_16_bits(family: Family, storage: str, method: Method, dtype: torch.dtype) -> None:
    """Train a 16-bit base for a few steps, and use the adapter in a mixed batch."""
    model = family.build(storage).to(dtype)
    base = logits(model)
    adapter = family.attach(model, method)
    assert logits(model).dtype == dtype
    assert torch.equal(logits(model), base) if starts_exactly(adapter) else error(logits(model), base) < 1e-2
    before = base_of(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = models.loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.99 * losses[0]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in adapter.parameters())  # type: ignore[union-attr]
    assert models.same(base_of(model), before)
    if has_factors(adapter):
        with torch.no_grad(), reparam.select(model, ["one", None, "one"]):
            mixed = logits(model)
        assert mixed.dtype == dtype
        assert error(mixed[0], logits(model)[0]) < 3e-2


@storages_in_turn(2)
def test_autocast_computes_in_bfloat16_and_keeps_the_masters(storage: str, method: Method) -> None:
    model, adapter = LLAMA.adapted(method, storage, seed=1)
    y = logits(model)
    model.train()
    expected = gradients(model, adapter)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, adapter)
        model.eval()
        low = logits(model)
        if has_factors(adapter):
            with torch.no_grad(), reparam.select(model, ["one", None, "one"]):
                assert error(logits(model)[0], low[0]) < 5e-2
    assert low.dtype == torch.bfloat16
    assert 1e-5 < error(low, y) < 5e-2
    assert all(g.dtype == torch.float32 for g in found.values())
    moved = {name: g for name, g in expected.items() if g.any()}  # tokens of an embedding that the batch has not: 0
    assert max(float((found[n] - g).norm() / g.norm()) for n, g in moved.items()) < 0.15


@first
def test_a_model_moved_to_float64_computes_there(method: Method) -> None:
    model, adapter = LLAMA.adapted(method, seed=1)
    y = logits(model)
    model.double()
    assert logits(model).dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in adapter.parameters())
    assert 0 < error(y, logits(model)) < 1e-5
