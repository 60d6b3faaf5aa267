"""What mixtures know of a forward: tasks, masks, prompts; causality, caches, checkpointing; auxiliary losses."""

import copy
from typing import Any

import models
import pytest
import torch
from cases import error, move
from mixtures import BY_TASK, SMALL, adapted, layer, run
from models import IDS, logits
from torch import Tensor

import reparam
from reparam.core.registry import METHODS

MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])
SEQUENCE = {"pool": "prompt", "losses": {}}


# ---- tasks


@pytest.mark.parametrize("name", BY_TASK)
def test_tasks_by_name_number_list_and_tensor(name: str) -> None:
    model, _ = adapted(name)
    alone = [run(model, name, task=task) for task in range(3)]
    for tasks in (["c", "a", "b"], [2, 0, 1], torch.tensor([2, 0, 1]), ("c", 0, "b")):
        with torch.no_grad(), reparam.context(model, tasks=tasks):
            found = model(input_ids=IDS).logits
        for row, task in enumerate((2, 0, 1)):
            assert error(found[row], alone[task][row]) < 1e-5
    with torch.no_grad(), reparam.context(model, tasks="a"):
        assert torch.equal(model(IDS).logits, alone[0])
        assert torch.equal(model(IDS, task="b").logits, alone[1])  # what one forward is told comes first


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("d", r"'d' is none of the 3 tasks \(a, b, c; numbers from 0\)"),
        (3, "3 is none of"),
        (-1, "-1 is none of"),
        (torch.tensor([0, 1, 7]), "7 is none of"),
        (torch.tensor([0.0, 1.0, 2.0]), "expected whole numbers"),
        (torch.tensor([[0, 1, 2]]), "expected whole numbers, one or one per row"),
        ([0, 1], "2 tasks were given, and the batch has 3 rows"),
        (None, "this forward needs a task, and no task was given"),
    ],
)
def test_tasks_that_cannot_be_are_refused(tasks: Any, message: str) -> None:
    model, _ = adapted("task_gated")
    with pytest.raises(ValueError, match=message):
        model(input_ids=IDS, task=tasks)
    if tasks is not None:
        with pytest.raises(ValueError, match=message), reparam.context(model, tasks=tasks):
            model(input_ids=IDS)


def test_context_is_for_mixtures_and_ends() -> None:
    model = models.llama()
    with pytest.raises(ValueError, match="no adapter on it"), reparam.context(model, tasks=0):
        pass
    reparam.attach(model, reparam.LoRA(), name="plain")
    with pytest.raises(ValueError, match="no adapter on this model is a mixture"), reparam.context(model, tasks=0):
        pass
    adapted("molora", model)
    with pytest.raises(ValueError, match="no adapter on this model has more than one"), reparam.context(model, tasks=0):
        pass
    for wrong in ([], [3], [True]):
        with pytest.raises(ValueError, match="experts: "), reparam.context(model, experts=wrong):
            pass
    with pytest.raises(ValueError, match="lengths of at least 1"), reparam.context(model, prompt=0):
        pass
    with pytest.raises(ZeroDivisionError), reparam.context(model, experts=[0]):
        raise ZeroDivisionError
    y = logits(model)
    with reparam.context(model, experts=[0]):
        assert error(logits(model), y) > 1e-3
    assert torch.equal(logits(model), y)


def test_one_expert_left_is_that_expert_and_all_are_no_mask() -> None:
    model, adapter = adapted("mole")
    y = run(model, "mole")
    with reparam.context(model, experts=[0, 1, 2]):
        assert torch.equal(run(model, "mole"), y)
    other = models.llama()
    with torch.no_grad():
        for path, update in adapter.updates.items():
            change = update.scale * update.B[:, 2:4] @ update.A[2:4]
            other.get_submodule(path).weight.add_(change)
    with reparam.context(model, experts=[1]):
        assert error(run(model, "mole"), logits(other)) < 1e-5


def test_generation_knows_its_tasks() -> None:
    model, _ = adapted("task_gated")
    settings = {"max_new_tokens": 5, "do_sample": False}
    with reparam.context(model, tasks=["c", "a", "b"]):
        mixed = model.generate(IDS, **settings)
    for row, task in enumerate("cab"):
        with reparam.context(model, tasks=task):
            assert torch.equal(model.generate(IDS[row : row + 1], **settings)[0], mixed[row])
    with reparam.context(model, tasks=["c", "a", "b"]), pytest.raises(ValueError, match="repeat each that often"):
        model.generate(IDS, num_beams=2, **settings)


# ---- sequences


def test_nothing_leaks_from_later_tokens() -> None:
    """A gate over all tokens does leak, which shows that this test would see it."""
    later = IDS.clone()
    later[:, 5:] = (later[:, 5:] + 11) % 97
    for pool, leaks in (("prompt", False), ("all", True)):
        model, _ = adapted("mole", pool=pool, losses={})
        with reparam.context(model, prompt=3):
            one, other = logits(model), logits(model, later)
        assert (error(one[:, :5], other[:, :5]) > 1e-3) == leaks
    for name in SMALL:
        if name != "mole":
            model, _ = adapted(name)
            assert error(run(model, name)[:, :5], run(model, name, later)[:, :5]) < 1e-6


def test_the_prompt_is_what_comes_before_the_first_label() -> None:
    model, _ = adapted("mole", **SEQUENCE)
    labels = IDS.clone()
    for row, first in enumerate((2, 4, 6)):
        labels[row, :first] = -100
    with torch.no_grad():
        found = model(input_ids=IDS, labels=labels).logits
        with reparam.context(model, prompt=[2, 4, 6]):
            assert torch.equal(model(input_ids=IDS).logits, found)
        with reparam.context(model, prompt=[2, 4, 5]):
            assert not torch.equal(model(input_ids=IDS).logits[2], found[2])
        all_of_it = model(input_ids=IDS, labels=IDS).logits  # the first token is predicted from nothing
        with reparam.context(model, prompt=1):
            assert torch.equal(model(input_ids=IDS).logits, all_of_it)
    with pytest.raises(ValueError, match="nothing says what the prompt is"):
        logits(model)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_part_of_the_prompt(side: str) -> None:
    model, _ = adapted("mole", **SEQUENCE)
    short, junk = IDS[:1, :5], torch.full((1, 2), 5)
    ids = torch.cat([junk, short] if side == "left" else [short, junk], 1)
    keep = slice(2, 7) if side == "left" else slice(0, 5)
    mask = torch.zeros_like(ids)
    mask[:, keep] = 1
    with torch.no_grad(), reparam.context(model, prompt=3):
        padded = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, keep]
        assert error(padded, model(short).logits) < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_generation_with_a_cache_is_full_recomputation(name: str) -> None:
    """Of a batch of prompts of several lengths, padded on the left."""
    model, _ = adapted(name, **(SEQUENCE if name == "mole" else {}))
    task = {"tasks": [2, 0, 1]} if name in BY_TASK else {}
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with reparam.context(model, **task):
        told = model.generate(IDS, attention_mask=MASK, **settings)
    ids, mask = IDS, MASK
    for step in range(5):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad(), reparam.context(model, prompt=MASK.sum(1), **task):
            found = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        assert error(found, told.logits[step]) < 3e-5
        ids = torch.cat([ids, told.sequences[:, 7 + step, None]], 1)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], 1)


def test_two_generations_at_once_keep_their_own_gates() -> None:
    from transformers import DynamicCache

    model, _ = adapted("mole", **SEQUENCE)
    prompts, caches = (IDS, IDS.flip(1)), (DynamicCache(config=model.config), DynamicCache(config=model.config))
    nexts = torch.full((3, 1), 9)
    with torch.no_grad():
        for ids, cache in zip(prompts, caches, strict=True):
            model(ids, past_key_values=cache)
        for ids, cache in zip(prompts, caches, strict=True):
            found = model(nexts, past_key_values=cache).logits[:, -1]
            with reparam.context(model, prompt=7):
                assert error(found, model(torch.cat([ids, nexts], 1)).logits[:, -1]) < 1e-5
        copied = copy.deepcopy(caches[0])
        with pytest.raises(RuntimeError, match="the cache holds tokens that this adapter has not seen"):
            model(nexts, past_key_values=copied)


# ---- two passes


def test_xlora_weighs_by_the_hidden_states_of_the_base() -> None:
    """Written out: the gates from the plain model's last hidden states; a base of one expert is that LoRA."""
    model, adapter = adapted("xlora")
    with torch.no_grad():
        hidden = models.llama()(IDS, output_hidden_states=True).hidden_states[-1]
    logits(model)
    router = adapter.shared.routers["model"]
    expected = torch.softmax(hidden @ router.weight.t() + router.bias, -1)
    for update in adapter.updates.values():
        assert error(update.choice(torch.zeros(3, 7, 1)).weights, expected) < 1e-5


def test_xlora_searches_with_beams_as_without_a_cache() -> None:
    model, _ = adapted("xlora")
    settings = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    found = [model.generate(IDS, attention_mask=MASK, use_cache=cache, **settings) for cache in (True, False)]
    assert torch.equal(*found)


def test_xlora_refuses_a_cache_that_was_cut_and_a_layer_alone() -> None:
    from transformers import DynamicCache

    model, adapter = adapted("xlora")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        cache.crop(-2)
        with pytest.raises(ValueError, match="the cache holds 5 tokens, and the first pass has seen 7"):
            model(IDS[:, 5:], past_key_values=cache)
    assert not adapter.shared.silent
    fresh, _ = adapted("xlora")
    with pytest.raises(RuntimeError, match="needs a forward of the whole model"):
        fresh.model.layers[0].mlp.up_proj(torch.zeros(1, 2, 32))
    with pytest.raises(ValueError, match="no plain sites"):
        METHODS["xlora"](plain="q_proj", frozen=False)
    other = models.llama()
    reparam.attach(other, METHODS["xlora"](n=2, r=2, frozen=False), targets=["down_proj"])
    with pytest.raises(ValueError, match="width of the first site's input, 48"):
        logits(other)


# ---- gradient checkpointing


def checkpointed(model: Any, reentrant: bool) -> None:
    model.train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [n for n in SMALL if n != "poly"])  # which draws at random in training
def test_forwards_one_after_the_other_have_their_own_gates(name: str, reentrant: bool) -> None:
    grads = []
    for check in (False, True):
        model, adapter = adapted(name)
        model.train()
        if check:
            checkpointed(model, reentrant)
        for number in range(2):
            task = {"task": torch.tensor([number, 1, 2])} if name in BY_TASK else {}
            model(input_ids=IDS + number, labels=IDS, attention_mask=MASK, **task).loss.backward()
        grads.append([p.grad for p in adapter.parameters()])
    assert max(error(a, b) for a, b in zip(*grads, strict=True)) < 1e-5


def test_two_forwards_before_their_backwards_are_refused_where_tasks_are_lost() -> None:
    model, _ = adapted("task_gated")
    losses = [model(input_ids=IDS, labels=IDS, task=task).loss for task in (0, 1)]
    sum(losses).backward()  # right without checkpointing
    checkpointed(model, False)
    losses = [model(input_ids=IDS, labels=IDS, task=task).loss for task in (0, 1)]
    with pytest.raises(RuntimeError, match="call backward after each forward"):
        sum(losses).backward()


def test_a_model_wide_gate_needs_the_kind_of_checkpointing_that_keeps_graphs() -> None:
    settings = {"scope": "model", "plain": r".*(k_proj|v_proj|down_proj)", "losses": {}}
    grads = []
    for check in (False, True):
        model, adapter = adapted("llava_mole", **settings)
        if check:
            checkpointed(model, False)
        models.loss(model).backward()
        grads.append([p.grad for p in adapter.parameters()])
    assert max(error(a, b) for a, b in zip(*grads, strict=True)) < 1e-5
    checkpointed(model, True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        models.loss(model).backward()


# ---- auxiliary losses


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
    """The gradient grows in proportion to the factor; the loss that is returned does not; evaluation knows nothing."""
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
    """By its tokens where transformers counts them, and by `accumulation` elsewhere."""
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
    """For a tenth of the steps, where their number is known; the count is in the controller's state."""
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
    assert "begin after step 2, and there were 0 steps" in again.finish()
    again.controller.load_state_dict({"steps": 2})
    models.loss(other).backward()
    assert "contrastive" in again.losses()
    again.bind(torch.optim.SGD(again.parameters(), lr=1e-3))
    assert again.finish() is None
    assert adapted("moelora_contrastive", contrastive_warmup=0.0)[1].controller is None


@pytest.mark.parametrize("tasks", [1, [2, 0, 1]])
def test_an_encoder_and_a_decoder_know_their_tasks(tasks: Any) -> None:
    """In generation the encoder is called without the model."""
    model, _ = adapted("task_gated", models.t5())
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with reparam.context(model, tasks=tasks):
        told = model.generate(IDS, **settings)
        with torch.no_grad():
            again = model(input_ids=IDS, decoder_input_ids=told.sequences[:, :-1]).logits
    assert error(torch.stack(told.logits, 1), again) < 1e-5
    with pytest.raises(ValueError, match="needs a task"):
        model.generate(IDS, **settings)


def test_an_encoder_and_a_decoder_train_with_auxiliary_losses() -> None:
    model, adapter = adapted("molora", models.t5(), losses={"switch_balance": 0.1})
    model.train()
    model(input_ids=IDS, attention_mask=MASK, labels=IDS[:, :4].contiguous()).loss.backward()
    assert 1 <= adapter.losses()["switch_balance"] <= 3
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model(input_ids=IDS, attention_mask=MASK, labels=IDS[:, :4].contiguous()).loss.backward()


def test_a_layer_that_is_used_twice_may_be_checkpointed() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)
            return x

    model = Twice()
    adapter = reparam.attach(model, METHODS["mixture"](n=2, r=2, losses={"router_z": 0.1}), targets=["layer"])
    move(adapter, 1)
    model(torch.randn(3, 6)).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_experts_that_no_token_may_use_are_never_chosen() -> None:
    model = models.llama()
    method = METHODS["moelora_contrastive"](**SMALL["moelora_contrastive"])
    adapter = reparam.attach(model, method)
    move(adapter, 1)
    with reparam.context(model, experts=[1, 3]):
        models.loss(model).backward()
    for update in adapter.updates.values():
        used = update.A.grad.view(4, 2, -1).abs().amax((1, 2)) > 0
        assert used.tolist() == [False, True, False, True]
