"""Passing tasks and experts to a forward of a mixture."""

from typing import Any

import models
import pytest
import torch
from cases import error, move
from mixtures import BY_TASK, SMALL, adapted, run
from models import IDS, logits

import reparam
from reparam.core.registry import METHODS


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
        ("d", r"'d' is not one of the 3 tasks \(a, b, c; numbers from 0\)"),
        (3, "3 is not one of"),
        (-1, "-1 is not one of"),
        (torch.tensor([0, 1, 7]), "7 is not one of"),
        (torch.tensor([0.0, 1.0, 2.0]), "expected whole numbers"),
        (torch.tensor([[0, 1, 2]]), "expected whole numbers, one or one per row"),
        ([0, 1], "2 tasks were given, but the batch has 3 rows"),
        (None, "this forward pass needs one task, and no task was given"),
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
    with pytest.raises(ValueError, match="one length, or one per row, of at least 1"), reparam.context(model, prompt=0):
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
    with (
        reparam.context(model, tasks=["c", "a", "b"]),
        pytest.raises(ValueError, match="repeat each task for each of its beams"),
    ):
        model.generate(IDS, num_beams=2, **settings)


@pytest.mark.parametrize("tasks", [1, [2, 0, 1]])
def test_an_encoder_and_a_decoder_know_their_tasks(tasks: Any) -> None:
    """During generation the encoder is called on its own."""
    model, _ = adapted("task_gated", models.t5())
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with reparam.context(model, tasks=tasks):
        told = model.generate(IDS, **settings)
        with torch.no_grad():
            again = model(input_ids=IDS, decoder_input_ids=told.sequences[:, :-1]).logits
    assert error(torch.stack(told.logits, 1), again) < 1e-5
    with pytest.raises(ValueError, match="needs one task"):
        model.generate(IDS, **settings)


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
