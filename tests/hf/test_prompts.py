"""Prefix and prompt tuning: outputs and files are compared with PEFT's."""

import json
import sys
from pathlib import Path

import models
import peft
import pytest
import torch
from cases import error
from models import IDS, logits

import reparam
from reparam.core.registry import METHODS
from reparam.errors import ConfigError, FormatError
from reparam.evaluation.score import complete
from reparam.hf import prompts
from reparam.hf.open import open_model
from reparam.hf.prompts import Prompts
from reparam.methods.prompts import Prefix, Prompt, Prompting
from reparam.train.config import resolve
from reparam.train.run import prepare

KINDS = [Prefix, Prompt]
kinds = pytest.mark.parametrize("kind", KINDS)


def moved(kind: type[Prompting], *, tokens: int = 5) -> Prompts:
    adapter = prompts.attach(models.llama(), kind(tokens=tokens))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.5)
    return adapter


@kinds
def test_it_is_pefts_model_with_one_score_for_each_token(kind: type[Prompting], tmp_path: Path) -> None:
    adapter = moved(kind)
    y = logits(adapter.model)
    assert y.shape[:2] == IDS.shape
    adapter.save(tmp_path / "a")
    assert {file.name for file in (tmp_path / "a").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    judge = peft.PeftModel.from_pretrained(models.llama(), str(tmp_path / "a")).eval()
    with torch.no_grad():
        assert torch.equal(judge(input_ids=IDS).logits[:, -IDS.shape[1] :], y)
    told = judge.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(adapter.model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False), told)


@kinds
def test_the_base_is_there_while_nothing_is_selected(kind: type[Prompting]) -> None:
    base = models.llama()
    y, told = logits(base), base.generate(IDS, max_new_tokens=4, do_sample=False)
    adapter = moved(kind)
    with reparam.select(adapter.model, None):
        assert torch.equal(logits(adapter.model), y)
        assert torch.equal(adapter.model.generate(IDS, max_new_tokens=4, do_sample=False), told)
    assert error(logits(adapter.model), y) > 1e-2


@kinds
def test_it_trains_alone_and_goes_round(kind: type[Prompting], tmp_path: Path) -> None:
    adapter = prompts.attach(models.llama(), kind(tokens=5))
    model = adapter.model
    assert sum(p.requires_grad for p in model.parameters()) == 1
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    adapter.bind(optimizer)
    losses = []
    for _ in range(8):
        loss = models.loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.99 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    adapter.save(tmp_path / "a")
    again = prompts.load(model, tmp_path / "a", name="again", activate=False)
    y = logits(model)
    with reparam.select(model, "again"):
        assert torch.equal(logits(model), y)
    assert again.method.tokens == 5
    assert not any(p.requires_grad for p in again.parameters())
    fresh = prompts.load(models.llama(), tmp_path / "a")
    assert torch.equal(logits(fresh.model), y)


@kinds
def test_the_start_depends_on_the_seed_alone(kind: type[Prompting]) -> None:
    state = torch.get_rng_state()
    one, two = (prompts.attach(models.llama(), kind(seed=seed)).parameters()[0] for seed in (3, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, two)
    assert not torch.equal(one, prompts.attach(models.llama(), kind(seed=4)).parameters()[0])


@kinds
def test_a_batch_of_prompts_of_different_lengths_changes_no_answer(kind: type[Prompting], tmp_path: Path) -> None:
    models.save_base(tmp_path / "base")
    model, tokenizer, _ = open_model(str(tmp_path / "base"), None)
    adapter = prompts.attach(model, kind(tokens=4))
    with torch.no_grad():
        adapter.parameters()[0].mul_(3)
    asked = [[7, 8, 9, 10, 11], [12, 13], [14, 15, 16], [17, 18]]
    together = complete(adapter.model, tokenizer, asked, max_new_tokens=6)
    assert together == [complete(adapter.model, tokenizer, [ids], max_new_tokens=6)[0] for ids in asked]


@kinds
def test_what_it_cannot_do_is_refused(kind: type[Prompting], tmp_path: Path) -> None:
    name = kind.name
    with pytest.raises(ValueError, match=rf"{name} cannot go on .*adds positions and changes no weight"):
        reparam.attach(models.llama(), kind())
    adapter = moved(kind)
    with pytest.raises(ValueError, match="do not support mixed batches"):
        reparam.select(adapter.model, ["default", None, "default"])
    with pytest.raises(ValueError, match="changes no weights, so there is nothing to merge"):
        reparam.merge(adapter.model)
    with pytest.raises(ValueError, match="load the base model again"):
        reparam.remove(adapter.model, "default")
    quantized = models.llama()
    reparam.quantize(quantized, "int8")
    with pytest.raises(ValueError, match=r"how the base was quantized; use base\.storage dense"):
        prompts.attach(quantized, kind())
    with pytest.raises(ValueError, match=r"tokens=0: expected a whole number"):
        kind(tokens=0)
    adapter.save(tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    (tmp_path / "a/adapter_config.json").write_text(json.dumps({**config, "num_virtual_tokens": 6}))
    with pytest.raises(FormatError, match=r"prompt_embeddings \[5, .*expected \[6"):
        prompts.load(models.llama(), tmp_path / "a")
    with pytest.raises(FormatError, match="neither prefix nor prompt tuning"):
        prompts.load(models.llama(), tmp_path)


@kinds
def test_without_peft_the_extra_is_named(kind: type[Prompting], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"needs PEFT, which is not installed: pip install 'reparam\[peft\]'"):
        prompts.attach(models.llama(), kind())


@kinds
def test_a_run_refuses_places(kind: type[Prompting], tmp_path: Path) -> None:
    models.save_base(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "def f(", "completion": "x):"}\n' * 30)
    own = {
        "base.path": str(tmp_path / "base"),
        "data.train": str(tmp_path / "rows.jsonl"),
        "run.output": str(tmp_path / "run"),
        "method.name": kind.name,
        "method.tokens": 4,
    }
    with pytest.raises(ConfigError, match="does not change modules"):
        prepare(resolve(None, {**own, "adapter.targets": "attention"}))
    job = prepare(resolve(None, own))
    assert isinstance(job.adapter, Prompts)
    assert job.adapter.model is job.model
    job.adapter.save(tmp_path / "run/adapter")
    model, _, adapter = open_model(None, tmp_path / "run")
    assert adapter is not None
    assert torch.equal(logits(model), logits(job.model.eval()))


def test_both_are_methods_of_the_command_line() -> None:
    assert METHODS["prefix"] is Prefix
    assert METHODS["prompt"] is Prompt
