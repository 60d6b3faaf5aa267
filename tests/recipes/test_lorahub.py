"""LoraHub on small models: the objective is a plain mean, nothing is modified, and the result is reproduced."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import trained
from command import reparam
from hearing import Heard
from models import ASSETS, frozen, same
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM

import reparam as library
from reparam import DoRA, LoRA
from reparam.adapter.attach import attach
from reparam.combine.blend import read_operand
from reparam.combine.candidates import Gates, candidates
from reparam.combine.operands import Operand
from reparam.core.progress import listening
from reparam.data.encode import encode
from reparam.data.rows import read_rows
from reparam.evaluation.score import token_losses
from reparam.hf.models import load_tokenizer
from reparam.recipes.lorahub import Losses, objective, search_to

ROWS = [
    {"prompt": "def f(a, b):", "completion": " a, b"},
    {"prompt": "def g(self):", "completion": " self and nothing else"},
    {"prompt": "class C:", "completion": " pass"},
    {"prompt": "x =", "completion": " 1"},
    {"prompt": "import os, sys\n", "completion": "os sys"},
]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("few") / "few.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture(scope="module")
def parts(base: str, few: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Adapters trained for a few steps on different rows, and one with a gain."""
    folder = tmp_path_factory.mktemp("parts")
    tokenizer = load_tokenizer(base)
    encoded = encode(read_rows(few), tokenizer, max_length=64)
    for name, chosen in (("a", [0, 1]), ("b", [2, 3]), ("c", [4])):
        model = AutoModelForCausalLM.from_pretrained(base)
        adapter = attach(model, LoRA(r=2, alpha=4, seed=len(name)), targets=["q_proj", "up_proj"])
        optimizer = torch.optim.Adam(adapter.parameters(), lr=0.03)
        for _ in range(15):
            for i in chosen:
                ids, labels = encoded[i]["input_ids"][None], encoded[i]["labels"][None]
                model(input_ids=ids, labels=labels).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        adapter.save(folder / name)
    trained(AutoModelForCausalLM.from_pretrained(base), method=DoRA(r=2)).save(folder / "gain")
    return [str(folder / name) for name in "abc"]


def operands(parts: list[str]) -> list[Operand]:
    return [read_operand(part) for part in parts]


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_objective_is_the_mean_over_examples_for_any_batch(
    batch: int,
    base: str,
    few: Path,
    parts: list[str],
) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), load_tokenizer(base)
    encoded = encode(read_rows(few), tokenizer, max_length=64)
    points = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.5, -0.5, 1.0]], dtype=torch.float64)
    with candidates(model, operands(parts)) as gates:
        losses = Losses(model, encoded, tokenizer, gates, batch=batch)
        found = losses(points)
        assert losses.forwards == -(-len(points) * len(encoded) // batch)
        values = objective(losses, l1=0.05)(points)
        summed = objective(losses, l1=0.05, l1_reduction="sum")(points)
    torch.testing.assert_close(torch.tensor(values).double(), found + 0.05 * points.abs().mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(summed).double(), found + 0.05 * points.abs().sum(1), rtol=1e-5, atol=1e-6)
    for point, adapter in ((0, None), (1, parts[0])):
        if adapter is not None:
            library.load(model, adapter)
        nats, tokens = token_losses(model, encoded, tokenizer, batch=2)
        torch.testing.assert_close(found[point], (nats / tokens).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_logits_are_computed_for_tokens_with_loss_alone_unless_the_head_is_adapted(
    target: str, base: str, few: Path, tmp_path: Path
) -> None:
    trained(AutoModelForCausalLM.from_pretrained(base), method=LoRA(r=2), targets=[target], tie=True).save(
        tmp_path / "one"
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), load_tokenizer(base)
    encoded = encode(read_rows(few), tokenizer, max_length=64)
    shapes: list[torch.Size] = []
    with candidates(model, operands([str(tmp_path / "one")])) as gates:
        losses = Losses(model, encoded, tokenizer, gates, batch=64)
        model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[:-1]))
        found = losses(torch.tensor([[1.0], [0.0]], dtype=torch.float64))
    tokens = int(encoded.loss.sum())
    whole = 2 * len(encoded) * int(encoded.lengths.max())
    assert sum(shape.numel() for shape in shapes) == (2 * tokens if target == "q_proj" else whole)
    for point, name in zip(found, (library.load(model, tmp_path / "one").name, None), strict=True):
        with library.select(model, name):
            nats, counts = token_losses(model, encoded, tokenizer, batch=2)
        torch.testing.assert_close(point, (nats / counts).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("space", "optimizer"), [("delta", "cobyla"), ("factor", "cobyla"), ("delta", "cma")])
def test_the_result_is_what_was_measured_and_better_than_the_base(
    space: str,
    optimizer: str,
    base: str,
    few: Path,
    parts: list[str],
    tmp_path: Path,
) -> None:
    before = {file: file.read_bytes() for part in parts for file in Path(part).iterdir()}
    quiet = Console(quiet=True)
    with listening(heard := Heard()):
        hub = search_to(tmp_path / "hub", parts, few, valid=few, space=space, optimizer=optimizer, console=quiet)
    assert heard.waits["searching for weights"] == (40, len(hub.found.history))
    assert hub.found.history[0].weights == (0.0, 0.0, 0.0)
    assert len(hub.found.history) <= 40
    assert hub.line("found").few < hub.line("base").few
    assert hub.line("found").valid == pytest.approx(hub.line("found").few)
    generation = 7 if optimizer == "cma" else 1  # candidates in a forward
    assert hub.forwards == math.ceil(len(hub.found.history) / generation)
    assert {file: file.read_bytes() for file in before} == before

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), load_tokenizer(base)
    library.load(model, tmp_path / "hub")
    nats, tokens = token_losses(model, encode(read_rows(few), tokenizer, max_length=64), tokenizer, batch=8)
    assert float((nats / tokens).mean()) == pytest.approx(hub.line("found").few, rel=1e-4)
    assert library.adapters(model)["default"].method.settings()["r"] == (6 if space == "delta" else 2)


def test_the_search_changes_no_bit_of_the_base_also_where_it_fails(
    base: str,
    few: Path,
    parts: list[str],
) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), load_tokenizer(base)
    before = frozen(model)
    encoded = encode(read_rows(few), tokenizer, max_length=64)

    def broken(gates: Gates) -> Tensor:
        Losses(model, encoded, tokenizer, gates, batch=8)(torch.ones(2, 3, dtype=torch.float64))
        raise ZeroDivisionError

    def run() -> None:
        with candidates(model, operands(parts)) as gates:
            broken(gates)

    with pytest.raises(ZeroDivisionError):
        run()
    assert same(frozen(model), before)


def test_from_the_command_line(few: Path, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--search", few, "--valid", few, "--budget", 8, "--optimizer", "cma", "--seed", 1, "-o", tmp_path / "hub"]
    assert reparam("compose", *parts, *more) == 0
    told = capsys.readouterr().out
    for expected in (
        "8 of 8 candidates, 2 forward passes",
        "base",
        "mean",
        "sum",
        "best single",
        "found",
        "held out",
        "exact",
    ):
        assert expected in told
    assert reparam("inspect", tmp_path / "hub") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--search", "FEW", "--weights", "1,2,3"], "--weights and --search cannot be used together"),
        (["--valid", "FEW"], "--valid is for --search"),
        (["--search", "EMPTY"], "the file is empty"),
        (["--search", "FEW", "--space", "ties"], "expected 'delta' or 'factor'"),
        (["--search", "FEW", "--bound", "0"], "bound=0.0: expected a finite number above 0"),
        (["--search", "FEW", "--optimizer", "adam"], "optimizer='adam': expected one of cobyla, cma"),
        (["--search", "FEW", "--budget", "0"], "expected at least 1 of each"),
        (["--search", "FEW", "--l1", "-1"], "l1=-1.0: expected a finite number"),
        (["--search", "FEW", "--l1-reduction", "max"], "expected one of mean, sum"),
        (["GAIN", "--search", "FEW"], "its gain also scales the frozen matrix"),
    ],
)
def test_one_sentence_for_each_mistake(
    arguments: list[Any],
    message: str,
    few: Path,
    parts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    places = {"FEW": few, "EMPTY": tmp_path / "empty.jsonl", "GAIN": Path(parts[0]).parent / "gain"}
    assert reparam("compose", *parts, *[places.get(a, a) for a in arguments], "-o", tmp_path / "out") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_on_the_embedded_model_with_adapters_of_different_ranks(few: Path, tmp_path: Path) -> None:
    """No adapter helps here, so the search must stay near the base and never score worse."""
    model = str(ASSETS / "tiny-python")
    for seed, r in enumerate((1, 3)):
        fresh = AutoModelForCausalLM.from_pretrained(model)
        trained(fresh, seed=seed, method=LoRA(r=r), targets=["q_proj"]).save(tmp_path / str(seed))
    adapters = [str(tmp_path / "0"), str(tmp_path / "1")]
    hub = search_to(tmp_path / "hub", adapters, few, budget=6, rank=2, console=Console(quiet=True))
    value = {tried.weights: tried.value for tried in hub.found.history}
    assert next(iter(value)) == (0.0, 0.0)
    assert hub.found.value <= value[(0.0, 0.0)] == pytest.approx(hub.line("base").few)
    assert hub.line("base").valid is None
    assert {site.rank for site in hub.blend.sites} <= {1, 2}
