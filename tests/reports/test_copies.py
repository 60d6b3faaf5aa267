"""Models with adapters are copied, pickled and saved by `torch.save`; the copy computes the same and is independent."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import IDS, llama, logits
from sampled import in_turn
from selecting import change
from torch import nn

import reparam


def through_torch(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch,
}
METHODS: dict[str, Any] = {
    "lora": reparam.LoRA(r=2),
    "dora": reparam.DoRA(r=2),
    "adalora": reparam.AdaLoRA(init_r=3, target_r=2, total_steps=9),
    "full": reparam.Full(),
    "bitfit": reparam.BitFit(),
    "intrinsic": reparam.Intrinsic(d=64),
    "bottleneck": reparam.Bottleneck(r=4),
    "molora": reparam.MoLoRA(n=2, r=2),
    "hydralora": reparam.HydraLoRA(n=2, r=2),
    "task_gated": reparam.TaskGated(n=2, r=2),
}
MIXED = ("lora", "dora", "adalora", "full", "bitfit", "intrinsic", "task_gated")


def adapted(method: str) -> Any:
    """A model with an adapter that changes it, after a training step and with its optimizer bound."""
    model = llama(attention_bias=True)
    adapter = reparam.attach(model, METHODS[method], name="a")
    change(adapter, 1)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.01)
    adapter.bind(optimizer)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    ("method", "way", "which"),
    [
        *((*case, "a") for case in in_turn(METHODS, WAYS)),
        *((*case, ["a", None, "a"]) for case in in_turn(MIXED, list(WAYS)[::-1])),
    ],
)
def test_a_copy_computes_the_same_and_is_independent(method: str, which: Any, way: str) -> None:
    model = adapted(method)
    reparam.select(model, which)
    before = logits(model)
    other = WAYS[way](model)
    assert torch.equal(logits(other), before)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_() if tensor.is_floating_point() else None
    assert not logits(other).any()
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(WAYS[way](model)), before)
    reparam.select(other, None)
    reparam.remove(other, "a")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_generates_merges_and_trains_on_its_own(way: str) -> None:
    model = adapted("lora")
    reparam.select(model, ["a", None, "a"])
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    wanted = model.generate(IDS, **settings)
    other = WAYS[way](model)
    assert torch.equal(other.generate(IDS, **settings), wanted)
    reparam.select(other, "a")
    reparam.select(model, "a")
    before = logits(model)
    adapter = reparam.adapters(other)["a"].requires_grad_()
    other(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD(adapter.parameters(), lr=1.0).step()
    after = logits(other)
    assert not torch.equal(after, before)
    reparam.merge(other)
    torch.testing.assert_close(logits(other), after, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), before)
    assert reparam.adapters(model)["a"].parameters()[0].grad is not None
