"""The figures of `inspect --probe` about routers, compared with hand counts and at their extremes."""

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from cases import move
from command import reparam as command
from transformers import AutoTokenizer

import reparam
from reparam.core.registry import METHODS
from reparam.data.encode import encode
from reparam.data.rows import read_rows
from reparam.inspect.routing import routing

TOKENIZER = AutoTokenizer.from_pretrained(models.ASSETS / "tiny-python")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": f"def f{'x' * i}(a):", "completion": " one", "task": "ab"[i % 2]} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mixture(name: str, file: Path, **settings: Any) -> Any:
    model = models.llama(vocab_size=4096)
    adapter = reparam.attach(model, METHODS[name](**settings))
    move(adapter, 1, size=0.3)
    tasks = adapter.method.tasks if len(adapter.method.tasks) > 1 else ()
    return adapter, encode(read_rows(file), TOKENIZER, max_length=64, tasks=tasks)


def test_shares_are_those_of_the_valid_tokens(file: Path) -> None:
    adapter, encoded = mixture("molora", file, n=3, r=2)
    found = routing(adapter, encoded, TOKENIZER, batch=4)
    assert [use.scope for use in found] == list(adapter.sites)
    first = adapter.updates[found[0].scope]
    p = []
    for example in encoded:
        with torch.no_grad():
            ids = example["input_ids"][None]
            seen = adapter.model.model.layers[0].input_layernorm(adapter.model.model.embed_tokens(ids))[0]
            p.append(first.choice(seen).p)
    whole = torch.cat(p)
    assert found[0].weight == pytest.approx(whole.mean(0).tolist(), rel=1e-5)
    load = torch.nn.functional.one_hot(whole.argmax(1), 3).float().mean(0)
    assert found[0].load == pytest.approx(load.tolist(), abs=1e-6)
    entropy = float(torch.special.entr(whole).sum(1).mean() / torch.log(torch.tensor(3.0)))
    assert found[0].entropy == pytest.approx(entropy, rel=1e-5)
    changes = [b @ a for a, b in zip(first.A.chunk(3), first.B.chunk(3, 1), strict=True)]
    cosines = [
        torch.cosine_similarity(changes[i].flatten(), changes[j].flatten(), 0) for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert found[0].redundancy == pytest.approx(float(sum(cosines) / 3), rel=1e-4)


def test_the_ends_of_the_scales(file: Path) -> None:
    adapter, encoded = mixture("llava_mole", file, n=3, r=2, dropout=0.0)
    with torch.no_grad():
        for key, parameter, _ in adapter.named_parameters():
            if "router" in key:
                parameter.zero_()
            if key.endswith("router.bias") or ("routers" in key and key.endswith("bias")):
                parameter.copy_(torch.tensor([0.0, 99.0, 0.0]))
        for update in adapter.updates.values():
            if hasattr(update, "slots"):
                update.A.copy_(update.A[:2].repeat(3, 1))
                update.B.copy_(update.B[:, :2].repeat(1, 3))
    found = routing(adapter, encoded, TOKENIZER)
    assert [use.scope for use in found] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for use in found:
        assert use.load == (0, 1, 0)
        assert use.entropy == pytest.approx(0, abs=1e-6)
        assert use.redundancy == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("task_gated", {"n": 2, "r": 4, "tasks": ("a", "b")}),
        ("poly", {"n": 2, "r": 2, "tasks": ("a", "b")}),
        ("mole", {"n": 2, "r": 2, "frozen": False}),
        ("xlora", {"n": 2, "r": 2, "frozen": False}),
        ("hydralora", {"n": 2, "r": 2}),
        ("mov", {"n": 2}),
        ("mixture", {"n": 2, "router": "static", "scope": "model"}),
        ("moelora_contrastive", {"n": 4, "r": 2}),
    ],
)
def test_every_kind_of_router_is_counted(name: str, settings: dict, file: Path) -> None:
    adapter, encoded = mixture(name, file, **settings)
    for use in routing(adapter, encoded, TOKENIZER):
        assert sum(use.load) == pytest.approx(1)
        assert sum(use.weight) == pytest.approx(1)
        assert 0 <= use.entropy <= 1
        assert -1 <= use.redundancy <= 1
    assert not adapter.model.training


def test_what_routes_nothing_is_refused(file: Path) -> None:
    model = models.llama(vocab_size=4096)
    adapter = reparam.attach(model, reparam.LoRA())
    with pytest.raises(ValueError, match="is not a mixture"):
        routing(adapter, encode(read_rows(file), TOKENIZER, max_length=64), TOKENIZER)


def test_from_the_command_line(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.save_base(tmp_path / "base")
    run = ["--max_steps", 2, "--batch_size", 2, "--data.score_rows", 1, "--method", "molora", "--method.n", 2]
    base = ["--base.path", tmp_path / "base"]
    assert command("train", *base, "--data.train", file, "-o", tmp_path / "out", *run) == 0
    capsys.readouterr()
    assert command("inspect", tmp_path / "out", "--probe", file, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 14
    assert {len(use["load"]) for use in found} == {2}
    assert command("inspect", tmp_path / "out", "--probe", file, "--plot", tmp_path / "plots") == 0
    assert (tmp_path / "plots" / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert "redundancy" in capsys.readouterr().out
