"""Loading onto a model: the check of the base, other adapters on the model, and no change after an error."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import trained
from models import build, frozen, gpt2, llama, logits, loss, same, tied_llama
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel

import reparam
from reparam import LoRA

FORMATS = pytest.mark.parametrize("format", ["reparam", "peft"])


def save(folder: Path, make: Callable[[], Any] = llama, *, format: str = "reparam", **settings: Any) -> torch.Tensor:
    """Save an adapter in `folder`, and return its logits."""
    model = make()
    trained(model, **settings).save(folder, format=format)
    with torch.no_grad():
        return logits(model)


def state(model: Any) -> tuple[Any, ...]:
    """Everything except tensors that a refused load must not change."""
    adapters = {name: list(adapter.sites) for name, adapter in reparam.adapters(model).items()}
    choice = model.reparam_state.choice if hasattr(model, "reparam_state") else "none"
    return str(model), [p.requires_grad for p in model.parameters()], adapters, choice, model.training


# The base


def further(model: Any, rate: float) -> Any:
    """The model after one step of training."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    loss(model).backward()
    optimizer.step()
    return model


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: build(type(llama()), llama(rope_theta=1e6).config), None),  # no weight of it differs
        (lambda: further(llama(), 1e-3), "trained on a base with different weights"),
        (lambda: further(llama(), 1e-6), "trained on a base with different weights"),
        (lambda: llama(initializer_range=0.11), "trained on a base with different weights"),
        (lambda: llama(num_hidden_layers=3), "trained on a base with different weights"),
        (lambda: llama(num_hidden_layers=1), "model.layers.1.self_attn.q_proj"),
        (lambda: llama(hidden_size=64), "is linear, 64 x 64, in this model"),
        (gpt2, "GPT2LMHeadModel lacks"),
    ],
)
def test_another_base_is_refused(other: Callable[[], Any], words: str | None, tmp_path: Path) -> None:
    save(tmp_path / "a")
    model = other()
    before, tensors = state(model), frozen(model)
    if words is None:
        reparam.load(model, tmp_path / "a")
        return
    with pytest.raises(reparam.FormatError, match=words):
        reparam.load(model, tmp_path / "a")
    assert state(model) == before
    assert same(frozen(model), tensors)


def test_another_class_with_the_same_modules(tmp_path: Path) -> None:
    save(tmp_path / "a")
    config = LlamaConfig(**{**llama().config.to_dict(), "num_labels": 3})
    model = build(LlamaForSequenceClassification, config)
    with pytest.raises(
        reparam.FormatError, match="trained on a LlamaForCausalLM, but this model is a LlamaForSequenceCl"
    ):
        reparam.load(model, tmp_path / "a")
    reparam.load(model, tmp_path / "a", check_base=False)
    with pytest.raises(reparam.FormatError, match=r"model.layers.0.* \(did you mean 'layers.0"):
        reparam.load(build(LlamaModel, config), tmp_path / "a", check_base=False)


def test_another_base_on_request(tmp_path: Path) -> None:
    save(tmp_path / "a")
    model = further(llama(), 1e-3)
    with torch.no_grad():
        before = logits(model)
        reparam.load(model, tmp_path / "a", check_base=False)
        assert not torch.allclose(logits(model), before)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_base_does_not_matter(saved: torch.dtype, loaded: torch.dtype, tmp_path: Path) -> None:
    """Copies of one set of weights match in any dtype; two 16-bit copies match if one was made from the other."""
    base = llama().to(saved)
    trained(base).save(tmp_path / "a")
    reparam.load((llama() if torch.float32 in (saved, loaded) else llama().to(saved)).to(loaded), tmp_path / "a")


# What is beside it


@FORMATS
def test_several_in_any_order(format: str, tmp_path: Path) -> None:
    expected = {}
    for i, settings in enumerate(
        [
            {"targets": ["q_proj"]},
            {"targets": "all-linear", "method": LoRA(r=3)},
            {"targets": ["embed_tokens"], "modules_to_save": ["model.norm"]},
        ]
    ):
        expected[f"a{i}"] = save(tmp_path / f"a{i}", seed=i, format=format, **settings)
    base = logits(llama())
    for names in (["a0", "a1", "a2"], ["a2", "a1", "a0"]):
        model = llama()
        for name in names:
            reparam.load(model, tmp_path / name, name=name)
            assert model.reparam_state.choice == name
        with torch.no_grad():
            for name in names:
                reparam.select(model, name)
                assert torch.equal(logits(model), expected[name])
            reparam.select(model, None)
            assert torch.equal(logits(model), base)
        for name in names:
            reparam.remove(model, name)
        assert str(model) == str(llama())
        assert same(frozen(model), frozen(llama()))


@FORMATS
def test_without_activating(format: str, tmp_path: Path) -> None:
    save(tmp_path / "a", format=format)
    model = llama()
    base = logits(model)
    reparam.load(model, tmp_path / "a", activate=False)
    assert torch.equal(logits(model), base)
    other = trained(model, name="other")
    reparam.load(model, tmp_path / "a", name="late", activate=False)
    assert model.reparam_state.choice == "other"
    assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_keeps_the_mode_of_the_model(training: bool, tmp_path: Path) -> None:
    save(tmp_path / "a", method=LoRA(r=2, dropout=0.5))
    model = llama().train(training)
    adapter = reparam.load(model, tmp_path / "a")
    assert model.training is training
    assert all(update.training is training for update in adapter.updates.values())


def test_order_of_parameters_is_the_models(tmp_path: Path) -> None:
    """The order must not depend on the file, because an optimizer's state is stored by position."""
    model = llama()
    names = [name for name, _, _ in trained(model, modules_to_save=["model.norm"]).named_parameters()]
    for format in ("reparam", "peft"):
        model.reparam_state.adapters["default"].save(tmp_path / format, format=format)
        found = reparam.load(llama(), tmp_path / format)
        assert [name for name, _, _ in found.named_parameters()] == names


def test_a_loaded_adapter_can_train_on(tmp_path: Path) -> None:
    save(tmp_path / "a")
    model = llama()
    adapter = reparam.load(model, tmp_path / "a").requires_grad_()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    adapter.bind(optimizer)
    before = float(loss(model))
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert float(loss(model)) < before


# Refusals leave the model alone


@pytest.mark.parametrize("name", ["taken", "a.b", "", "*", "training", "keys", "copy", "../x"])
def test_names_that_cannot_be(name: str, tmp_path: Path) -> None:
    save(tmp_path / "a")
    model = llama()
    trained(model, name="taken")
    before = state(model)
    with pytest.raises(ValueError, match="name="):
        reparam.load(model, tmp_path / "a", name=name)
    assert state(model) == before


CLASHES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "whole over sites": ({"targets": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, "lm_head"),
    "site over whole": (
        {"modules_to_save": ["lm_head"]},
        {"targets": ["lm_head"]},
        "lm_head: taken trains a full copy of this module",
    ),
}


@FORMATS
@pytest.mark.parametrize("clash", CLASHES)
def test_clash_with_another_adapter(clash: str, format: str, tmp_path: Path) -> None:
    first, second, words = CLASHES[clash]
    save(tmp_path / "a", format=format, **second)
    model = llama()
    trained(model, name="taken", **first)
    before, expected = state(model), logits(model)
    with pytest.raises(reparam.FormatError, match=words):
        reparam.load(model, tmp_path / "a")
    assert state(model) == before
    assert torch.equal(logits(model), expected)
    reparam.remove(model, "taken")
    reparam.load(model, tmp_path / "a")


@FORMATS
@pytest.mark.parametrize("part", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("whole", [True, False])
def test_tied_weights(whole: bool, part: str, format: str, tmp_path: Path) -> None:
    def untied() -> Any:
        model = tied_llama()
        reparam.untie(model)
        return model

    expected = save(
        tmp_path / "a", untied, format=format, **({"modules_to_save": [part]} if whole else {"targets": [part]})
    )
    model = tied_llama()
    before, tensors = state(model), frozen(model)
    with pytest.raises(reparam.FormatError, match=r"shares its weight with .*untie"):
        reparam.load(model, tmp_path / "a")
    assert state(model) == before
    assert same(frozen(model), tensors)
    reparam.untie(model)
    reparam.load(model, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("beside", [True, False])
def test_tensors_that_do_not_fit_are_found_before_anything_is_touched(
    make: Callable[[], Any], beside: bool, tmp_path: Path
) -> None:
    """A rank other than the file's is found by the last check, after every update has been built."""
    save(tmp_path / "a", make, targets="all-linear")
    record = reparam.io.files.read(tmp_path / "a")
    object.__setattr__(record, "method", LoRA(r=3))
    reparam.io.files.write(tmp_path / "b", record)
    model = make()
    if beside:
        trained(model, name="taken", targets="attention")
    before, tensors = state(model), frozen(model)
    with pytest.raises(reparam.FormatError, match=r"has shape .*expected"):
        reparam.load(model, tmp_path / "b")
    assert state(model) == before
    assert same(frozen(model), tensors)


# Cost


def calls(action: Callable[[], object]) -> int:
    """The number of function calls, Python and C, that an action makes."""
    count = 0

    def note(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


@FORMATS
def test_the_last_adapter_costs_what_the_second_did(format: str, tmp_path: Path) -> None:
    save(tmp_path / "a", targets="all-linear", format=format)
    model = llama()
    found = [calls(lambda i=i: reparam.load(model, tmp_path / "a", name=f"a{i}")) for i in range(24)]
    assert max(found[-3:]) <= found[1] * 1.02


def test_cost_grows_with_the_model_and_no_faster(tmp_path: Path) -> None:
    found = []
    for layers in (4, 8):
        save(tmp_path / str(layers), lambda n=layers: llama(num_hidden_layers=n), targets="all-linear")
        model = llama(num_hidden_layers=layers)
        found.append(calls(lambda m=model, n=layers: reparam.load(m, tmp_path / str(n))))
    assert found[1] < 2.1 * found[0]


@pytest.mark.parametrize("part", ["layers.1", "self_attn", "mlp"])
def test_modules_that_can_and_cannot_be_replaced_whole(part: str, tmp_path: Path) -> None:
    """PEFT replaces any module with a forward; reparam cannot replace one that takes a mask besides its input."""
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["lm_head"], modules_to_save=[part]))
    theirs.save_pretrained(str(tmp_path))
    model = llama()
    before = state(model)
    if part == "mlp":
        reparam.load(model, tmp_path)
        with torch.no_grad():
            assert torch.equal(logits(model), logits(theirs))
        return
    with pytest.raises(reparam.FormatError, match=r"layers.* cannot be trained whole"):
        reparam.load(model, tmp_path)
    assert state(model) == before


def test_a_list_of_modules_is_not_replaced_whole() -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"model.layers cannot be trained whole: ModuleList does not define forward"):
        reparam.attach(model, LoRA(r=1), targets=["lm_head"], modules_to_save=["layers"])
    assert not hasattr(model, "reparam_state")
