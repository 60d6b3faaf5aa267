"""DoRA in whole models, compared with PEFT."""

import copy
import warnings
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from dora_cases import random, stored, update_of
from models import IDS, logits
from safetensors.torch import load_file, save_file
from torch import nn

import reparam
from reparam.core.base import Site
from reparam.io.peft import WEIGHTS
from reparam.methods.mixture.method import Mixture
from reparam.sites.linear import Linear

# ---- in models


def test_magnitudes_move_in_a_16_bit_model() -> None:
    """By steps that bfloat16 would round away, because they are float32 parameters."""
    model = models.llama().bfloat16()
    adapter = reparam.attach(model, reparam.DoRA(r=2))
    magnitudes = [p for name, p, role in adapter.named_parameters() if role == "gain"]
    assert len(magnitudes) == 14
    assert all(p.dtype == torch.float32 for p in magnitudes)
    before = [p.detach().clone() for p in magnitudes]
    optimizer = torch.optim.SGD(magnitudes, lr=1e-5)
    models.loss(model).backward()
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(magnitudes, before, strict=True)]
    rounded = [torch.equal(p.bfloat16(), b.bfloat16()) for p, b in zip(magnitudes, before, strict=True)]
    assert all(moved)
    assert all(rounded)


@stored
@pytest.mark.parametrize("settings", [{}, {"norm_axis": "input"}, {"magnitude_only": True}], ids=str)
def test_merging_and_mixed_batches_on_every_storage(storage: str, settings: dict[str, Any]) -> None:
    model = models.llama()
    if storage != "dense":
        reparam.quantize(model, storage)
    for name in ("a", "b"):
        method = reparam.DoRA(r=3, **settings) if name == "a" else reparam.LoRA(r=2)
        adapter = reparam.attach(model, method, name=name)
        with torch.no_grad():
            for p in adapter.parameters():
                p += 0.1
    alone = {}
    for name in ("b", None, "a"):
        reparam.select(model, name)
        alone[name] = logits(model)
    rows = ["a", None, "b"]
    with torch.no_grad(), reparam.select(model, rows):
        mixed = logits(model)
    for row, name in enumerate(rows):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-5)
    report = reparam.merge(model)
    assert min(report.survival().values()) > 0.999
    torch.testing.assert_close(logits(model), alone["a"], rtol=1e-4, atol=1e-5)


def test_it_trains_one_number_for_each_output_more_than_lora() -> None:
    """LLaMA-7B with q, k, v, up and down: 876,544 (paper, Table 1: + 0.01 %)."""
    count = {}
    for method in (reparam.LoRA(r=32), reparam.DoRA(r=32)):
        with torch.device("meta"):
            square = {name: nn.Linear(4096, 4096) for name in "qkv"}
            model = nn.ModuleDict({**square, "up": nn.Linear(4096, 11008), "down": nn.Linear(11008, 4096)})
        adapter = reparam.attach(model, method)
        count[method.name] = 32 * sum(p.numel() for p in adapter.parameters())
    assert count["dora"] - count["lora"] == 876_544


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient": "none"}, "gradient='none': expected one of detached, exact"),
        ({"norm_axis": 1}, "norm_axis=1: expected a string"),
        ({"r": 0}, "r=0: a rank is a whole number of at least 1"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reparam.DoRA(**settings)


# ---- PEFT as the judge


def theirs(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_dora=True)
        )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for p in wrapped.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn_like(p)
    return wrapped


def test_outputs_and_gradients_are_pefts(tmp_path: Path) -> None:
    judge = theirs(models.llama())
    judge.save_pretrained(str(tmp_path))
    model = models.llama()
    adapter = reparam.load(model, tmp_path).requires_grad_()
    assert adapter.method.name == "dora"
    torch.testing.assert_close(logits(model), logits(judge), rtol=1e-4, atol=1e-5)
    models.loss(model).backward()
    judge(input_ids=IDS, labels=IDS).loss.backward()
    expected = {
        name.replace(".default", "").removeprefix("base_model.model."): p.grad
        for name, p in judge.named_parameters()
        if p.grad is not None
    }
    names = {"low_rank.A": "lora_A.weight", "low_rank.B": "lora_B.weight", "magnitude": "lora_magnitude_vector.weight"}
    found = 0
    for name, p, _ in adapter.named_parameters():
        site, part = next((name.removesuffix("." + end), new) for end, new in names.items() if name.endswith(end))
        torch.testing.assert_close(p.grad, expected[f"{site}.{part}"], rtol=1e-3, atol=1e-6)
        found += 1
    assert found == len(expected)


def test_rows_of_a_mixed_batch_that_peft_refuses(tmp_path: Path) -> None:
    judge = theirs(models.llama())
    judge.save_pretrained(str(tmp_path))
    expected = logits(judge)
    with pytest.raises(ValueError, match="DoRA"):
        judge.eval()(input_ids=IDS, adapter_names=["default"] * len(IDS))
    model = models.llama()
    reparam.load(model, tmp_path, name="a")
    with torch.no_grad(), reparam.select(model, ["a"] * len(IDS)):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_peft_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    theirs(models.llama()).save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if key.endswith("down_proj.lora_magnitude_vector"))
    rest = {k: v for k, v in tensors.items() if k != key}
    save_file(rest, tmp_path / WEIGHTS)
    with pytest.raises(reparam.FormatError, match=f"missing {key}"):
        reparam.load(models.llama(), tmp_path)
    save_file({**tensors, key: tensors[key][:-1]}, tmp_path / WEIGHTS)
    with pytest.raises(reparam.FormatError, match="magnitude has shape"):
        reparam.load(models.llama(), tmp_path)
    save_file({**tensors, key.replace("down_proj", "gate_proj"): tensors[key].clone()}, tmp_path / WEIGHTS)
    with pytest.raises(reparam.FormatError, match=r"unknown tensor .*gate_proj\.lora_magnitude_vector"):
        reparam.load(models.llama(), tmp_path)


def test_peft_files_for_embeddings_are_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True)
    peft.get_peft_model(models.llama(), config).save_pretrained(str(tmp_path))
    with pytest.raises(reparam.FormatError, match="on an embedding has one magnitude per column"):
        reparam.load(models.llama(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "targets", "message"),
    [
        ({"norm_axis": "input"}, ["q_proj"], "norm_axis='input'"),
        ({"magnitude_only": True}, ["q_proj"], "magnitudes only"),
        ({}, ["embed_tokens"], "the embedding model.embed_tokens"),
    ],
)
def test_what_peft_has_no_equal_of(settings: dict[str, Any], targets: list[str], message: str, tmp_path: Path) -> None:
    adapter = reparam.attach(models.llama(), reparam.DoRA(r=2, **settings), targets=targets)
    with pytest.raises(reparam.FormatError, match=message):
        adapter.save(tmp_path / "out", format="peft")
    adapter.save(tmp_path / "own")
    assert reparam.load(models.llama(), tmp_path / "own").method == adapter.method


def test_the_axis_is_in_our_file(tmp_path: Path) -> None:
    """On a square layer the shapes do not reveal the axis."""
    model = nn.Sequential(nn.Linear(4, 4))
    adapter = reparam.attach(model, reparam.DoRA(r=1, norm_axis="input"), targets=["0"])
    adapter.save(tmp_path / "own")
    again = copy.deepcopy(model)
    reparam.remove(again, "default")
    assert reparam.load(again, tmp_path / "own").method.settings()["norm_axis"] == "input"


def test_magnitudes_lie_over_a_static_mixture() -> None:
    """Any update with factors and no gain works; cached norms are recomputed when the mixture's gates change."""
    w = random(6, 5)
    plain = nn.Linear(5, 6, bias=False, dtype=torch.float64)
    plain.weight = nn.Parameter(w.clone())
    adapted = Linear.wrap(plain)
    site = Site("layer", "linear", 6, 5)
    mixture = Mixture(n=3, r=2, router="static", scope="module").build(site, adapted.frozen, None)
    adapted.add("a", reparam.DoRA().over(mixture.double(), site, adapted.frozen))
    adapted.active = "a"
    adapted.double().eval()
    x = random(4, 5, seed=2)
    for seed in (3, 4):
        with torch.no_grad():
            for number, parameter in enumerate(adapted.updates["a"].parameters()):
                parameter += 0.3 * random(*parameter.shape, seed=10 * seed + number)
        update = update_of(adapted)
        assert update.low_rank is not None
        moved = update.low_rank.factors(adapted.frozen).apply(w)
        expected = (update.magnitude / moved.norm(dim=1))[:, None] * moved
        with torch.no_grad():
            assert torch.allclose(adapted(x), x @ expected.T, atol=1e-10)
            assert torch.allclose(update.factors(adapted.frozen).apply(w), expected, atol=1e-10)
