"""A new method is one file: a toy that uses every interface, registered for one test, supports every feature.

It has state that all sites share, a controller that counts steps, a penalty, a saved buffer, and a variant that depends
on its input.
"""

import copy
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from cases import FAMILIES, error, move
from models import IDS, logits
from torch import Tensor, nn
from toys import Counter, Nudge, Pair, registered

import reparam
from reparam.combine.compress import compress
from reparam.core.base import Site
from reparam.core.registry import METHODS, method
from reparam.errors import FormatError, InputDependentError
from reparam.inspect.spectrum import spectra
from reparam.io import files, peft_formats
from reparam.io.peft_formats import CONFIG, PREFIX, Folder, PeftFormat, peft_format
from reparam.io.peft_weights import WEIGHTS
from reparam.io.record import Record

LLAMA = FAMILIES["llama"]
SHARED = {"reparam_shared.width32", "reparam_shared.width48"}


def step(model: nn.Module, adapter: reparam.Adapter, optimizer: torch.optim.Optimizer) -> float:
    """One optimizer step on the loss plus the penalty."""
    loss = models.loss(model)
    penalty = adapter.penalty()
    optimizer.zero_grad()
    (loss if penalty is None else loss + penalty).backward()
    optimizer.step()
    return float(loss)


def test_it_trains_with_its_controller_and_its_penalty() -> None:
    model, adapter = LLAMA.adapted(Nudge(price=0.5))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.bind(optimizer)
    losses = [step(model, adapter, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert isinstance(adapter.controller, Counter)
    assert (adapter.controller.steps, adapter.controller.gradients) == (4, 4)
    expected = sum(0.5 * float(update.b.square().sum()) for update in adapter.updates.values())
    assert float(adapter.penalty()) == pytest.approx(expected, rel=1e-5)
    adapter.penalty().backward()
    assert LLAMA.adapted(Nudge(), name="free")[1].penalty() is None


def test_shared_state_is_owned_once_by_the_root() -> None:
    model, adapter = LLAMA.adapted(Nudge())
    held = [name for name, _ in model.named_parameters() if "width32" in name]
    assert held == ["reparam_shared.one.width32"]
    assert {name for name, _, role in adapter.named_parameters() if role == "core"} == SHARED
    assert sum(p.requires_grad for p in model.parameters()) == len(adapter.parameters())
    models.loss(model).backward()
    model.double()
    assert adapter.shared is not None
    assert all(p.dtype == torch.float64 for p in adapter.shared.parameters())
    assert logits(model).dtype == torch.float64


def test_an_optimizer_without_the_shared_state_is_refused() -> None:
    _, adapter = LLAMA.adapted(Nudge())
    own = [p for name, p, _ in adapter.named_parameters() if name not in SHARED]
    with pytest.raises(ValueError, match=r"2 parameters are not in the optimizer .*reparam_shared\.width32"):
        adapter.bind(torch.optim.SGD(own, lr=1))


def test_it_is_saved_whole_and_loaded(tmp_path: Path) -> None:
    model, adapter = LLAMA.adapted(Nudge(strength=0.5))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.bind(optimizer)
    for _ in range(3):
        step(model, adapter, optimizer)
    adapter.save(tmp_path / "a")
    assert adapter.tensors().keys() >= SHARED

    other = LLAMA.make()
    again = reparam.load(other, tmp_path / "a", name="again")
    assert again.method == Nudge(strength=0.5)
    assert torch.equal(logits(other), logits(model))
    assert {int(update.steps) for update in again.updates.values()} == {3}
    assert not any(p.requires_grad for p in again.parameters())
    with pytest.raises(FormatError, match="PEFT has no equivalent of the method 'nudge'"):
        adapter.save(tmp_path / "b", format="peft")


def test_peft_refuses_it_in_one_sentence(tmp_path: Path) -> None:
    _, adapter = LLAMA.adapted(Nudge())
    with pytest.raises(FormatError) as caught:
        adapter.save(tmp_path / "a", format="peft")
    assert str(caught.value) == "PEFT has no equivalent of the method 'nudge'; save with format='reparam'"
    assert not (tmp_path / "a").exists()


class Doubled(reparam.LoRA):
    """A subclass of LoRA without its own file format."""


def test_a_format_is_for_one_method_and_no_subclass(tmp_path: Path) -> None:
    """A subclass may compute something else, so it is refused until it registers its own format."""
    _, adapter = LLAMA.adapted(Doubled(r=2))
    with pytest.raises(FormatError, match="PEFT has no equivalent of the method 'lora'"):
        adapter.save(tmp_path / "a", format="peft")
    with pytest.raises(AssertionError, match="two formats are registered for LoRA"):
        peft_format(reparam.LoRA)(NudgeFormat)


class NudgeFormat(PeftFormat[Nudge]):
    """A PEFT format for `Nudge`, as if PEFT had this method."""

    peft_type = "NUDGE"

    def read(self, folder: Folder) -> Record:
        """Read the settings and the tensors."""
        sites = {name: Site(name, **site) for name, site in folder.settings["sites"].items()}
        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in folder.tensors().items()}
        shared = {f"reparam_shared.{key}": torch.tensor(value) for key, value in folder.settings["common"].items()}
        return Record(Nudge(strength=folder.settings["strength"]), sites, tensors | shared)

    def settings(self, method: Nudge, record: Record) -> dict[str, Any]:
        """Settings: the strength, the sites, and their shared state."""
        return {
            "peft_type": self.peft_type,
            "strength": method.strength,
            "common": {key.split(".")[1]: record.tensors[key].tolist() for key in SHARED},
            "sites": {
                name: {"kind": s.kind, "out_features": s.out_features, "in_features": s.in_features}
                for name, s in record.sites.items()
            },
        }

    def tensors(self, name: str, site: Site, record: Record) -> dict[str, Tensor]:
        """All tensors of a site."""
        return {f".{key}": record.tensors[f"{name}.{key}"] for key in ("a", "b", "gain", "steps")}


def test_it_goes_through_peft_once_it_registers_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_formats, "FORMATS", dict(peft_formats.FORMATS))
    peft_format(Nudge)(NudgeFormat)
    model, adapter = LLAMA.adapted(Nudge(strength=0.5))
    adapter.save(tmp_path / "a", format="peft")
    other = LLAMA.make()
    assert reparam.load(other, tmp_path / "a").method == Nudge(strength=0.5)
    assert torch.equal(logits(other), logits(model))
    assert {file.name for file in (tmp_path / "a").iterdir()} == {CONFIG, WEIGHTS}


def test_a_format_of_an_installed_package_reads_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It works without importing the package first."""
    monkeypatch.setattr(peft_formats, "FORMATS", dict(peft_formats.FORMATS))
    _, adapter = LLAMA.adapted(Nudge(strength=0.5))
    with monkeypatch.context() as there:
        there.setattr(peft_formats, "FORMATS", {**peft_formats.FORMATS, Nudge: NudgeFormat()})
        adapter.save(tmp_path / "a", format="peft")
    with pytest.raises(FormatError, match=r"peft_type 'NUDGE' is not supported .*LORA, ADALORA"):
        reparam.load(LLAMA.make(), tmp_path / "a")
    monkeypatch.setattr(peft_formats, "load_installed", lambda group: peft_format(Nudge)(NudgeFormat))
    assert reparam.load(LLAMA.make(), tmp_path / "a").method == Nudge(strength=0.5)


def test_two_of_them_have_shared_state_of_their_own() -> None:
    """Also in a mixed batch; removing one adapter keeps the other's state."""
    model, _ = LLAMA.adapted(Nudge(), seed=1)
    alone = logits(model)
    move(LLAMA.attach(model, Nudge(strength=2), name="two"), 2)
    second = logits(model)
    with torch.no_grad(), reparam.select(model, ["two", "one", None]):
        mixed = logits(model)
    with reparam.select(model, None):
        base = logits(model)
    for row, expected in enumerate((second, alone, base)):
        assert error(mixed[row], expected[row]) < 1e-5
    reparam.remove(model, "two")
    reparam.select(model, "one")
    assert torch.equal(logits(model), alone)
    reparam.remove(model, "one")
    assert str(model) == str(LLAMA.make())
    assert torch.equal(logits(model), base)


def test_merging_folds_it_and_restore_brings_the_shared_state_back() -> None:
    model, adapter = LLAMA.adapted(Nudge(), seed=1)
    y = logits(model)
    report = reparam.merge(model, keep_base=True)
    assert error(logits(model), y) < 1e-5
    assert str(model) == str(LLAMA.make())
    report.restore()
    assert torch.equal(logits(model), y)
    model.double()
    assert all(p.dtype == torch.float64 for p in adapter.parameters())


def test_a_copy_of_the_model_has_shared_state_of_its_own() -> None:
    model, adapter = LLAMA.adapted(Nudge(), seed=1)
    twin = copy.deepcopy(model)
    y = logits(model)
    with torch.no_grad():
        for parameter in reparam.adapters(twin)["one"].shared.parameters():
            parameter.add_(1)
    assert torch.equal(logits(model), y)
    assert error(logits(twin), y) > 1e-2
    assert adapter.shared is not reparam.adapters(twin)["one"].shared


def test_the_root_may_be_a_sequential() -> None:
    """A Sequential calls every module that it owns, so shared state must not break it."""
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
    x = torch.randn(3, 5)
    base = model(x)
    move(reparam.attach(model, Nudge()), 1)
    with reparam.select(model, None):
        assert torch.equal(model(x), base)
    assert error(model(x), base) > 1e-2
    reparam.merge(model)
    assert len(model) == 3


def test_an_update_that_depends_on_its_input_is_used_alone(tmp_path: Path) -> None:
    """It can be trained, saved and loaded, but not merged, mixed in a batch or attached to an embedding."""
    model = LLAMA.make()
    base = str(model)
    with pytest.raises(InputDependentError, match="routed"):
        reparam.attach(model, Nudge(routed=True), targets=["q_proj", "embed_tokens"])
    assert str(model) == base
    adapter = reparam.attach(model, Nudge(routed=True), name="routed")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.bind(optimizer)
    losses = [step(model, adapter, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0]
    y = logits(model)
    move(reparam.attach(model, reparam.LoRA(), name="plain"), 1)
    with pytest.raises(InputDependentError):
        reparam.select(model, ["plain", "routed", None])
    with torch.no_grad(), reparam.select(model, ["plain", "plain", None]):
        logits(model, IDS)
    reparam.select(model, "routed")
    with pytest.raises(InputDependentError):
        reparam.merge(model)
    assert torch.equal(logits(model), y)
    adapter.save(tmp_path / "a")
    other = LLAMA.make()
    reparam.load(other, tmp_path / "a")
    assert torch.equal(logits(other), y)


def test_commands_that_are_for_other_methods_refuse_it_in_a_sentence(tmp_path: Path) -> None:
    model, adapter = LLAMA.adapted(Nudge(), seed=1)
    adapter.save(tmp_path / "a")
    with pytest.raises(FormatError, match="nudge has no components that could be dropped one by one; lora, dora, ada"):
        compress(tmp_path / "a", rank=1)
    with pytest.raises(ValueError, match=r"\(nudge\) is not a mixture of low-rank experts"):
        reparam.split(model, "one")
    assert all(update.expert_choice() is None for update in adapter.updates.values())
    found = spectra(files.read(tmp_path / "a"), LLAMA.make())
    assert {seen.kind for seen in found.values()} == {"leading"}


def test_one_with_components_is_compressed(tmp_path: Path) -> None:
    """Through the methods' interface; no code checks for its class."""
    with registered(pair=Pair):
        _, adapter = LLAMA.adapted(Pair(4), seed=1)
        adapter.save(tmp_path / "a")
        before = {name: update.factors(adapter.modules[name].frozen) for name, update in adapter.updates.items()}
        found = compress(tmp_path / "a", rank=2)
        assert found.record.method == Pair(2)
        other = LLAMA.make()
        smaller = found.put(other)
        for site in found.sites:
            kept = smaller.updates[site.name].factors(smaller.modules[site.name].frozen)
            full = before[site.name]
            assert kept.A.shape[0] == 2 < full.A.shape[0]
            assert float((full.B @ full.A - kept.B @ kept.A).norm()) == pytest.approx(site.lost, rel=1e-4)
        other_method = LLAMA.adapted(Nudge(), seed=1)[1].record()
        with pytest.raises(FormatError, match="lora, dora, adalora, lora_bias, pair have"):
            compress(other_method, rank=1)


def test_registering_lasts_as_long_as_the_test_and_names_are_unique() -> None:
    before = dict(METHODS)
    with registered(fleeting=Nudge):
        assert METHODS["fleeting"] is Nudge
    assert before == METHODS
    with pytest.raises(AssertionError, match="two methods are called lora"):
        method("lora")(Nudge)
    Nudge.name = "nudge"


def test_gradients_reach_the_shared_state_from_every_site() -> None:
    model, adapter = LLAMA.adapted(Nudge(), seed=1)
    models.loss(model).backward()
    assert adapter.shared is not None
    whole: Tensor = adapter.shared["width32"].grad  # type: ignore[index]
    parts = torch.zeros_like(whole)
    for name in adapter.sites:
        other, again = LLAMA.adapted(Nudge(), seed=1)
        separate = copy.deepcopy(again.shared)
        again.updates[name].owner = (separate,)  # type: ignore[assignment]
        models.loss(other).backward()
        found = separate["width32"].grad  # type: ignore[index]
        parts += 0 if found is None else found
    assert error(parts, whole) < 1e-4
