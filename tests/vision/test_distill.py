"""Distillation: which states meet, the losses, what is trained, and teachers of every family."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from seeing import FAMILIES, VISION, batch, seeing, vit
from torch import Tensor, nn

from reparam.errors import BaseError
from reparam.vision import Teacher, VoRA
from reparam.vision.teachers import load_teacher


class Blocks(nn.Module):
    """A module that is no model of transformers: it returns the outputs of two blocks."""

    def __init__(self, states: list[Tensor]) -> None:
        super().__init__()
        self.states = states

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return [state[: len(pixels)] for state in self.states]


def step(vora: VoRA) -> Any:
    given = batch()
    return vora.train()(given.ids, **given.inputs())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_states_are_those_of_patches(name: str) -> None:
    """Against transformers' own hidden states: the first ones enter block 0; tokens such as CLS are left out."""
    model = vit(name)
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    found = Teacher(model)(pixels, VISION, {0, 1})
    extra = FAMILIES[name][2]
    assert all(torch.equal(found[index], wanted[index][:, extra:]) for index in (0, 1))
    assert Teacher(model).measured(VISION) == (2, 16)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_with_every_family(name: str) -> None:
    """Images of other sizes and patches than the teacher's, in one batch."""
    vora = seeing()
    changes = {"is_native": True} if name == "aimv2" else {}  # its table of positions is not interpolated
    vora.distill(vit(name, image_size=16, patch_size=4, **changes))
    before = {n: p.clone() for n, p in vora.named_parameters()}
    step(vora)
    total = vora.distillation.total()
    assert all(0 <= float(loss.detach()) <= 2 for loss in vora.distillation.losses)
    assert torch.allclose(total, torch.stack(vora.distillation.losses).mean())
    total.backward()
    moved = {name for name, p in vora.named_parameters() if p.grad is not None}
    assert any("heads" in name for name in moved)
    assert any(name.startswith("embedding.") for name in moved)
    assert any(".updates." in name for name in moved)
    assert not any("lm_head" in name or "embed_tokens" in name for name in moved)
    assert all(torch.equal(before[n], p) for n, p in vora.named_parameters())


def test_which_states_meet() -> None:
    """Against heads and cosines that are computed by hand from transformers' hidden states."""
    given, model = batch(), vit()
    for pairs, expected in {"aligned": ((1, 1), (2, 2)), "upstream": ((0, 1), (1, 2))}.items():
        vora = seeing()
        vora.distill(model, pairs=pairs)  # type: ignore[arg-type]
        assert vora.distillation.pairs == expected
        step(vora)
        states = vora.states.found
        images = given.images >= 0
        taught = [Teacher(model)(image[None], VISION, {1, 2}) for image in given.pixels]
        for loss, head, (student, teacher) in zip(
            vora.distillation.losses, vora.distillation.heads, expected, strict=True
        ):
            mine = states[student][images].double()
            norm, out = head[0].weight.double(), head[1].weight.double()
            mine = (mine / (mine.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm) @ out.T
            theirs = torch.cat([each[teacher][0] for each in taught]).double()
            cosine = (mine * theirs).sum(1) / mine.norm(dim=1) / theirs.norm(dim=1)
            assert torch.allclose(loss.double(), (1 - cosine).mean(), atol=1e-5)


def test_the_students_states_are_those_of_its_blocks() -> None:
    vora, given = seeing(), batch()
    vora.distill(vit(), pairs=[(0, 1), (2, 2)])
    with torch.no_grad():
        wanted = vora.eval()(given.ids, **given.inputs(), output_hidden_states=True).hidden_states
        step(vora)
    assert torch.allclose(vora.states.found[0], wanted[0])
    assert torch.allclose(vora.states.found[2], wanted[2], atol=1e-5)


def test_the_range_of_the_loss() -> None:
    """0 for a multiple of the teacher's states, 2 for their negative, 1 for zeros, and no change by the scale."""
    vora = seeing()
    states = [torch.randn(3, 16, 5, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
    made = vora.distill(Teacher(Blocks(states), patch=2))
    theirs = states[0][0]
    assert float(made._loss(3 * theirs, theirs)) == pytest.approx(0, abs=1e-6)
    assert float(made._loss(-theirs, 7 * theirs)) == pytest.approx(2, abs=1e-6)
    with pytest.warns(UserWarning, match="16 states of the teacher are zero"):
        assert float(made._loss(theirs, torch.zeros(16, 5))) == 1


def test_text_alone_and_evaluation_have_no_distillation() -> None:
    vora, given = seeing(), batch()
    vora.distill(vit())
    step(vora)
    assert vora.distillation.total() is not None
    vora(given.ids)
    assert vora.distillation.total() is None
    vora.eval()(given.ids, **given.inputs())
    assert vora.distillation.total() is None


def test_the_teacher_is_no_part_of_the_model() -> None:
    vora, model = seeing(), vit()
    size = len(vora.state_dict())
    vora.distill(model)
    assert len(vora.state_dict()) == size + 2 * len(vora.distillation.pairs)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in vora.parameters()}
    vora.distill(None)
    assert len(vora.state_dict()) == size


def test_gradient_checkpointing_changes_nothing() -> None:
    found = []
    for checkpointing in (False, True):
        vora = seeing()
        vora.distill(vit())
        if checkpointing:
            vora.language.activation_checkpointing_enable({"use_reentrant": False})
        step(vora)
        vora.distillation.total().backward()
        found.append({name: p.grad.clone() for name, p in vora.trained().items() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


def test_teachers_that_do_not_fit() -> None:
    wrong = [torch.zeros(1, 15, 5)] * 2
    for make, told in (
        (lambda: seeing().distill(vit(num_hidden_layers=3)), "teacher has 3 blocks, and 2 blocks"),
        (lambda: seeing().distill(vit(), pairs=[(3, 1)]), r"\(3, 1\): expected states 0 ... 2"),
        (lambda: seeing().distill(vit(), pairs="same"), "'aligned', 'upstream'"),  # type: ignore[arg-type]
        (lambda: seeing().distill(vit(), pairs=[]), "at least one pair"),
        (lambda: seeing().distill(vit(), weight=0), "above 0"),
        (lambda: seeing().distill(Blocks(wrong)), "side of the patches"),
        (lambda: seeing().distill(vit("aimv2", image_size=12)), "cannot see images of"),
        (lambda: seeing().distill(Teacher(Blocks(wrong), patch=2)), "15 tokens for an image .* 4 x 4 patches"),
    ):
        with pytest.raises(ValueError, match=told):
            make()


def test_a_teacher_is_loaded_with_its_normalization(tmp_path: Path) -> None:
    vit("clip").save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    file.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    found = load_teacher(str(tmp_path))(pixels, VISION, {1})[1]
    plain = pixels * torch.tensor(VISION.std).view(3, 1, 1) + torch.tensor(VISION.mean).view(3, 1, 1)
    wanted = Teacher(vit("clip"))((plain - 0.5) / 0.5, VISION, {1})[1]
    assert torch.allclose(found, wanted, atol=1e-5)
    file.write_text('{"image_mean": [0.5]}')
    with pytest.raises(BaseError, match="image_std"):
        load_teacher(str(tmp_path))


def test_a_folder_without_a_vision_model(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match="no such folder"):
        load_teacher(str(tmp_path / "none"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BaseError, match="no vision transformer"):
        load_teacher(str(tmp_path))
