"""Auxiliary losses of mixtures: their values, their gradients, and when they count."""

from typing import Any

import models
import pytest
import torch
from cases import error
from mixtures import MASK, adapted, layer
from models import IDS
from torch import Tensor

import reparam

LOSSES = {
    "switch_balance": ("llava_mole", {}),
    "mole_balance": ("mole", {}),
    "loramoe_blc": ("loramoe", {"router": "token"}),
    "router_z": ("molora", {}),
    "contrastive": ("moelora_contrastive", {}),
}


def gradients(name: str, weight: float, changes: dict[str, Any], **inputs: Any) -> tuple[Any, list[Tensor], float]:
    preset, settings = LOSSES[name]
    model, adapter = adapted(preset, losses={name: weight}, **settings, **changes)
    model.train()
    loss = model(input_ids=IDS, labels=IDS, attention_mask=MASK, **inputs).loss
    loss.backward()
    return adapter, [p.grad for p in adapter.parameters()], float(loss)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reaches_the_gradient_and_no_figure(name: str) -> None:
    """The gradient is proportional to the factor; the returned loss and evaluation do not change."""
    adapter, none, value = gradients(name, 0.0, {})
    assert adapter.losses() == {}
    adapter, once, same = gradients(name, 0.5, {})
    _, twice, _ = gradients(name, 1.0, {})
    assert value == same
    assert adapter.losses().keys() == {name}
    moved = [p for (p, _, _), a, b in zip(adapter.named_parameters(), none, once, strict=True) if not torch.equal(a, b)]
    assert moved
    assert any(("router" in p) != (name == "contrastive") for p in moved)
    own = [(b - a, c - a) for a, b, c in zip(none, once, twice, strict=True)]
    whole = torch.cat([(2 * one - two).flatten() for one, two in own]).norm()
    assert whole < 1e-3 * torch.cat([two.flatten() for _, two in own]).norm()
    adapter.model.eval()
    adapter.model.zero_grad()
    models.loss(adapter.model).backward()
    model, plain = adapted(LOSSES[name][0], losses={}, **LOSSES[name][1])
    models.loss(model).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(adapter.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_differences_of_the_loss(name: str) -> None:
    preset, settings = LOSSES[name]
    model, adapter, x = layer(preset, losses={name: 2.0}, **settings)
    model.train()

    def value() -> float:
        model(x)
        return adapter.losses()[name]

    (model(x) * 0).sum().backward()
    checked = 0
    for key, parameter, _ in adapter.named_parameters():
        flat, grad = parameter.data.view(-1), parameter.grad.view(-1)
        place = int(grad.abs().argmax())
        if grad[place] == 0:
            continue
        before, found = float(flat[place]), []
        for step in (1e-5, -1e-5):
            flat[place] = before + step
            found.append(value())
        flat[place] = before
        assert 2 * (found[0] - found[1]) / 2e-5 == pytest.approx(float(grad[place]), rel=1e-3), key
        checked += 1
    assert checked == (2 if name in ("switch_balance", "contrastive") else 1)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_is_in_no_statistic(name: str) -> None:
    values = []
    for junk in (5, 77):
        ids = IDS.masked_fill(MASK == 0, junk)
        preset, settings = LOSSES[name]
        model, adapter = adapted(preset, losses={name: 1.0}, **settings)
        model.train()
        model(
            input_ids=ids, attention_mask=MASK, position_ids=(MASK.cumsum(1) - 1).clamp(min=0)
        ).logits.sum().backward()
        values.append(adapter.losses()[name])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_loss_counts_as_the_models_own_does() -> None:
    """By its tokens if transformers counts them, and by `accumulation` otherwise."""
    labels = IDS.clone()
    labels[:, :3] = -100  # 12 of the tokens have loss
    zero = gradients("router_z", 0.0, {})[1]
    whole = [b - a for a, b in zip(zero, gradients("router_z", 1.0, {})[1], strict=True)]
    preset, settings = LOSSES["router_z"]
    found = []
    for factor in (0.0, 1.0):
        model, adapter = adapted(preset, losses={"router_z": factor}, **settings)
        model.train()
        model(input_ids=IDS, labels=labels, attention_mask=MASK, num_items_in_batch=48).loss.backward()
        found.append([p.grad for p in adapter.parameters()])
    quarter = [b - a for a, b in zip(*found, strict=True)]
    assert max(error(4 * q, w) for q, w in zip(quarter, whole, strict=True) if w.abs().max() > 1e-6) < 1e-3
    model, adapter = adapted(preset, losses={"router_z": 1.0}, **settings)
    model.train()
    with reparam.context(model, accumulation=4):
        loss = model(input_ids=IDS, labels=IDS, attention_mask=MASK).loss
    (loss / 4).backward()
    assert max(error(4 * p.grad, w + z) for p, w, z in zip(adapter.parameters(), whole, zero, strict=True)) < 1e-4


def test_the_contrastive_loss_waits_for_outputs_to_compare() -> None:
    """For a tenth of the steps, if their number is known; the count is in the controller's state."""
    model, adapter = adapted("moelora_contrastive", contrastive_warmup=0.1)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-3)
    adapter.bind(optimizer, total_steps=20)
    model.train()
    seen = []
    for _ in range(4):
        models.loss(model).backward()
        seen.append("contrastive" in adapter.losses())
        assert "switch_balance" in adapter.losses()
        optimizer.step()
        optimizer.zero_grad()
    assert seen == [False, False, True, True]
    assert adapter.finish() is None
    assert adapter.controller.state_dict() == {"steps": 4}

    other, again = adapted("moelora_contrastive", contrastive_warmup=0.1)
    other.train()
    again.bind(torch.optim.SGD(again.parameters(), lr=1e-3), total_steps=20)
    assert "starts after step 2, and there were 0 steps" in again.finish()
    again.controller.load_state_dict({"steps": 2})
    models.loss(other).backward()
    assert "contrastive" in again.losses()
    again.bind(torch.optim.SGD(again.parameters(), lr=1e-3))
    assert again.finish() is None
    assert adapted("moelora_contrastive", contrastive_warmup=0.0)[1].controller is None


def test_an_encoder_and_a_decoder_train_with_auxiliary_losses() -> None:
    model, adapter = adapted("molora", models.t5(), losses={"switch_balance": 0.1})
    model.train()
    model(input_ids=IDS, attention_mask=MASK, labels=IDS[:, :4].contiguous()).loss.backward()
    assert 1 <= adapter.losses()["switch_balance"] <= 3
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model(input_ids=IDS, attention_mask=MASK, labels=IDS[:, :4].contiguous()).loss.backward()
