"""reparam's own adapter files: their contents, and that loading restores everything."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import trained
from models import bert, gpt2, llama, logits, same, t5, tied_llama
from safetensors.torch import load_file
from torch import Tensor, nn

import reparam
from reparam import LoRA
from reparam.io import files
from reparam.sites.fingerprint import fingerprint

WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"
SITE, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
GOLDEN = Path(__file__).parents[1] / "golden" / "adapter_v1"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """An intact adapter folder, and its logits."""
    folder = tmp_path_factory.mktemp("native") / "adapter"
    model = llama()
    trained(model, modules_to_save=["model.norm"]).save(folder)
    return folder, logits(model).detach()


@pytest.fixture
def folder(good: tuple[Path, Tensor], tmp_path: Path) -> Path:
    """A copy of the intact folder, to be damaged."""
    return Path(shutil.copytree(good[0], tmp_path / "adapter"))


# What is written


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (llama, {"targets": "all-linear"}),
        (llama, {"method": LoRA(r=3, alpha=0.3, scaling="alpha", rank_pattern={"q_proj": 1, r".*1\.mlp\..*": 5})}),
        (llama, {"method": LoRA(r=3, scaling="rslora", dropout=0.1, init="gaussian", init_std=0.3, seed=4)}),
        (llama, {"targets": ["embed_tokens", "lm_head"]}),
        (llama, {"modules_to_save": ["norm", "lm_head"]}),
        (tied_llama, {}),
        (gpt2, {"targets": "all-linear", "bias": True, "modules_to_save": ["ln_f"]}),
        (bert, {"targets": "all-linear", "bias": True, "modules_to_save": ["classifier"]}),
        (t5, {"targets": "attention"}),
    ],
)
def test_round_trip(make: Callable[[], Any], options: dict[str, Any], tmp_path: Path) -> None:
    model = make()
    adapter = trained(model, **options)
    adapter.save(tmp_path / "a")
    again = make()
    found = reparam.load(again, tmp_path / "a", name="other")
    assert found.method == adapter.method
    assert found.sites == adapter.sites
    assert same(found.tensors(), adapter.tensors())
    with torch.no_grad():
        assert torch.equal(logits(again), logits(model))
    assert not any(p.requires_grad for p in found.parameters())
    found.save(tmp_path / "b")
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_saving_twice_writes_the_same_bytes(good: tuple[Path, Tensor], tmp_path: Path) -> None:
    trained(llama(), modules_to_save=["model.norm"]).save(tmp_path / "again")
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / file).read_bytes() == (good[0] / file).read_bytes()


def test_holds_the_adapter_and_nothing_of_the_base(tmp_path: Path) -> None:
    adapter = trained(llama(), targets="all-linear")
    adapter.save(tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {WEIGHTS, CONFIG}
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert {key.rsplit(".", 1)[1] for key in found} == {"A", "B"}
    size, numbers = (tmp_path / "out" / WEIGHTS).stat().st_size, sum(p.numel() for p in adapter.parameters())
    assert 4 * numbers < size < 4 * numbers + 200 * len(found)  # each has a name and a place in the header


def test_saved_from_a_model_with_other_adapters(good: tuple[Path, Tensor], tmp_path: Path) -> None:
    model = llama()
    trained(model, targets="all-linear", name="first", method=LoRA(r=5))
    adapter = trained(model, modules_to_save=["model.norm"], name="second")
    reparam.select(model, "first")
    adapter.save(tmp_path / "out")
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "out" / file).read_bytes() == (good[0] / file).read_bytes()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_saved_after_merging_and_restoring(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    adapter = trained(model, targets="all-linear")
    adapter.save(tmp_path / "before")
    report = reparam.merge(model, keep_base=True)
    report.restore()
    adapter.save(tmp_path / "after")
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()


def test_nan_is_not_saved(tmp_path: Path) -> None:
    adapter = trained(llama())
    adapter.save(tmp_path / "out")
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    adapter.updates[SITE].B.data[0, 0] = float("nan")  # type: ignore[union-attr, operator, index]
    with pytest.raises(ValueError, match=f"{SITE}.B; not saved"):
        adapter.save(tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before


def test_replaces_an_adapter_and_nothing_else(folder: Path) -> None:
    adapter = trained(llama(), method=LoRA(r=1))
    adapter.save(folder)
    reparam.load(llama(), folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt"):
        adapter.save(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="holds other files"):
        adapter.save(folder.parent, format="peft")
    with pytest.raises(ValueError, match="is a file"):
        adapter.save(folder / WEIGHTS)


def test_an_adapter_in_the_other_format_is_not_replaced(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"holds other files \(adapter.json"):
        trained(llama()).save(folder, format="peft")
    reparam.load(llama(), folder)


def test_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'pickle': expected one of reparam, peft"):
        trained(llama()).save(tmp_path / "out", format="pickle")


# A file of an earlier release


def steps(parameters: Iterable[nn.Parameter], size: int) -> None:
    """Values that every machine computes identically."""
    for i, parameter in enumerate(parameters):
        count = parameter.numel()
        parameter.data = ((torch.arange(count) - count // 2 + i) / size).view_as(parameter)


class Golden(nn.Module):
    """A base whose weights come from no random generator."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 4)
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        steps(self.parameters(), 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.down(torch.relu(self.up(self.emb(ids)))))


def golden_adapter(model: Golden) -> reparam.Adapter:
    """The adapter that `golden/adapter_v1` was saved from."""
    method = LoRA(r=2, alpha=3, rank_pattern={"up": 1}, alpha_pattern={"emb": 5})
    adapter = reparam.attach(
        model, method, targets=["emb", "up", "down"], modules_to_save=["norm"], bias=True, name="golden"
    )
    steps(adapter.parameters(), 32)
    return adapter


def test_the_first_version_stays_readable() -> None:
    model, expected = Golden(), Golden()
    adapter = golden_adapter(expected)
    found = reparam.load(model, GOLDEN)
    assert same(found.tensors(), adapter.tensors())
    assert found.method == adapter.method
    assert torch.equal(model(torch.arange(5)), expected(torch.arange(5)))


def test_the_first_version_is_what_is_written() -> None:
    """But for the fingerprint: the first release digested the modules that the adapter replaces, too."""
    record = golden_adapter(Golden()).record()
    written = files.FORMATS["reparam"].files(record)
    found, first = json.loads(written[CONFIG]), json.loads((GOLDEN / CONFIG).read_bytes())
    assert found["base"].pop("digests") != first["base"].pop("digests")
    assert found.pop("digest") != first.pop("digest")
    assert list(found.items()) == list(first.items())
    assert written[WEIGHTS] == (GOLDEN / WEIGHTS).read_bytes()
    old = dataclasses.replace(record, base=dataclasses.replace(record.base, digests=fingerprint(Golden())))
    assert files.FORMATS["reparam"].files(old)[CONFIG] == (GOLDEN / CONFIG).read_bytes()
