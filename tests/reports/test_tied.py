"""`attach(..., tie=True)`: one update acts on all modules that share a weight (PEFT's `ensure_weight_tying`)."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import command
import peft
import pytest
import torch
import transformers
from models import IDS, gpt2, llama, logits, loss, same, tied_llama
from tiny_configs import tiny
from torch import Tensor, nn

import reparam
from reparam.hf.open import open_model
from reparam.io import native

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2, "alpha": 3},
    "dora": {"r": 2, "alpha": 3},
    "adalora": {"init_r": 3, "target_r": 2, "total_steps": 10},
    "full": {},
}
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def adapted(method: str = "lora", *, model: Any = None, targets: Any = ("embed_tokens", "q_proj"), **more: Any) -> Any:
    """A tied model with an adapter that has random values, and the adapter."""
    model = tied_llama() if model is None else model
    adapter = reparam.attach(model, method, targets=targets, tie=True, **SETTINGS[method], **more)
    scramble(adapter)
    return model, adapter


@torch.no_grad()
def scramble(adapter: reparam.Adapter) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def by_hand(adapter: reparam.Adapter, plain: Any) -> Any:
    """The plain model in float64 with W' = diag(gain) W + B A at each site; its tied head follows by itself."""
    plain = plain.double()
    for path, update in adapter.updates.items():
        factors = update.factors(adapter.modules[path].frozen)
        weight = plain.get_submodule(path).weight
        weight.copy_(factors.apply(weight.detach()))
    return plain


@pytest.mark.parametrize("method", SETTINGS)
def test_one_update_acts_on_both_uses(method: str, tmp_path: Path) -> None:
    base = logits(tied_llama())
    model = tied_llama()
    adapter = reparam.attach(model, method, targets=["lm_head", "q_proj"], tie=True, **SETTINGS[method])
    assert torch.equal(logits(model), base)
    assert adapter.tied == {HEAD: EMBEDDING}
    assert HEAD not in adapter.sites
    assert len({id(p) for p in adapter.parameters()}) == len(adapter.parameters())
    scramble(adapter)
    expected = logits(by_hand(adapter, tied_llama()))
    found = logits(model)
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert not torch.allclose(found, base, atol=0.1)

    with pytest.warns(UserWarning, match="bind") if method == "adalora" else contextlib.nullcontext():
        adapter.save(tmp_path / "a")
    other = tied_llama()
    again = reparam.load(other, tmp_path / "a")
    assert again.tied == {HEAD: EMBEDDING}
    assert torch.equal(logits(other), found)
    assert other.lm_head.weight is other.model.embed_tokens.weight

    reparam.merge(model)
    assert torch.allclose(logits(model).double(), expected, atol=1e-4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "m").eval()), logits(model))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_is_that_of_a_tied_model(method: str) -> None:
    """The gradients of both uses add up, as those of a tied matrix do."""
    model, adapter = adapted(method, targets=["embed_tokens"])
    plain = tied_llama().double()
    update = adapter.updates[EMBEDDING]
    own = {name: p.detach().double().requires_grad_() for name, p in update.named_parameters()}
    with torch.no_grad():
        start = plain.model.embed_tokens.weight.clone()
    changed = start + 1.5 * own["B"] @ own["A"] if method == "lora" else own["matrix"]
    tied = {f"{EMBEDDING}.weight": changed, "lm_head.weight": changed}
    result = torch.func.functional_call(plain, tied, (), {"input_ids": IDS, "labels": IDS}, tie_weights=False)
    result.loss.backward()
    loss(model).backward()
    for name, parameter in update.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad.double(), own[name].grad, atol=1e-5), name  # type: ignore[arg-type]


def test_selection_mixed_batches_copies_and_removal() -> None:
    model, _ = adapted("dora")
    base, one = logits(tied_llama()), logits(model)
    other = reparam.attach(model, reparam.LoRA(r=3), targets=["v_proj"], name="other")
    scramble(other)
    two = logits(model)
    with reparam.select(model, ["default", "other", None]):
        rows = logits(model)
    for row, alone in enumerate((one, two, base)):
        assert torch.allclose(rows[row], alone[row], atol=1e-5)
    reparam.select(model, "default")
    assert torch.equal(logits(copy.deepcopy(model)), one)
    report = reparam.merge(model, keep_base=True)
    assert [site.name for site in report.sites].count(EMBEDDING) == 1
    report.restore()
    assert torch.equal(logits(model), one)
    reparam.remove(model, "default")
    reparam.remove(model, "other")
    assert torch.equal(logits(model), base)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_files_of_a_whole_model_hold_the_update_once(tmp_path: Path) -> None:
    model, _ = adapted()
    model.save_pretrained(tmp_path)
    stock = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(stock), logits(tied_llama()))
    reparam.load(stock, tmp_path)
    assert torch.equal(logits(stock), logits(model))
    fresh, adapter = adapted()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))


def test_an_untied_base_takes_the_update_at_both_matrices(tmp_path: Path) -> None:
    _, adapter = adapted()
    adapter.save(tmp_path / "a")
    model = llama()
    reparam.load(model, tmp_path / "a", check_base=False)
    expected = by_hand(adapter, llama())
    a, b, _ = adapter.updates[EMBEDDING].factors(adapter.modules[EMBEDDING].frozen)
    with torch.no_grad():
        expected.lm_head.weight += b.double() @ a.double()
    assert torch.allclose(logits(model).double(), logits(expected), atol=1e-4)
    reparam.merge(model)
    assert torch.allclose(logits(model).double(), logits(expected), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "embedding", "head"),
    [
        ("BertForMaskedLM", "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
        ("GPT2LMHeadModel", "transformer.wte", "lm_head"),
        ("T5ForConditionalGeneration", "shared", "lm_head"),
        ("BartForConditionalGeneration", "model.shared", "lm_head"),
        ("Gemma3ForCausalLM", "model.embed_tokens", "lm_head"),
    ],
)
def test_other_layouts(name: str, embedding: str, head: str) -> None:
    """BERT's decoder also shares its bias, T5's and BART's embeddings have four uses, and some have a scale."""
    model = tiny(getattr(transformers, name))
    plain = copy.deepcopy(model)
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets=[head], tie=True)
    assert list(adapter.sites) == [embedding]
    assert head in adapter.tied
    scramble(adapter)
    assert torch.allclose(_outputs(model).double(), _outputs(by_hand(adapter, plain)), atol=1e-4)


def _outputs(model: Any) -> Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, **more).logits
    return found


def test_everything_includes_tied_weights() -> None:
    model = gpt2(tied=True)
    adapter = reparam.attach(model, "full", tie=True)
    assert adapter.tied == {"lm_head": "transformer.wte"}
    held = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert held == sum(p.numel() for p in gpt2(tied=True).parameters())


def test_what_cannot_be_is_refused_in_a_sentence() -> None:
    for method in ("intrinsic", "bottleneck", "molora", "lora_bias"):
        model = tied_llama()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=rf"tie: {method} cannot act on several modules .* lora, .*untie"):
            reparam.attach(model, method, targets=["lm_head"], tie=True)
        assert same(dict(model.state_dict()), state)
    bert = tiny(transformers.BertForMaskedLM)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cls\.predictions\.decoder shares its weight with cls\.predictions, so"):
        reparam.attach(bert, reparam.LoRA(), targets=["cls.predictions.decoder"], tie=True, bias=True)
    model, _ = adapted()
    with pytest.raises(ValueError, match=r"an adapter is on model\.embed_tokens, which shares its weight"):
        reparam.untie(model)
    with pytest.raises(ValueError, match=r"shares its weight with .*untie"):
        reparam.attach(model, reparam.LoRA(), targets=["lm_head"], name="alone")
    with pytest.raises(ValueError, match=r"lm_head shares its weight with model\.embed_tokens, so .* modules_to_save"):
        reparam.attach(tied_llama(), reparam.LoRA(), modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match=r"tie has no effect: none of the modules .* shares its weight"):
        reparam.attach(tied_llama(), reparam.LoRA(r=1), tie=True)


# ---- PEFT's files


def in_peft(folder: Path, make: Any, **settings: Any) -> Tensor:
    """Save PEFT's adapter with random values, tied, and return the logits of PEFT."""
    config = peft.LoraConfig(r=2, lora_alpha=4, ensure_weight_tying=True, **settings)
    model = peft.get_peft_model(make(), config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2, generator=generator)
    model.save_pretrained(str(folder))
    return logits(model)


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"], ".*embed_tokens|.*v_proj"], ids=str)
@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "rank_pattern": {"embed_tokens|lm_head": 3}}], ids=str)
def test_peft_reads_and_writes_the_same_update(targets: Any, more: dict[str, Any], tmp_path: Path) -> None:
    expected = in_peft(tmp_path / "a", tied_llama, target_modules=targets, **more)
    model = tied_llama()
    adapter = reparam.load(model, tmp_path / "a")
    assert adapter.tied == {HEAD: EMBEDDING}
    assert torch.allclose(logits(model), expected, atol=1e-5)
    adapter.save(tmp_path / "b", format="peft")
    back = peft.PeftModel.from_pretrained(tied_llama(), str(tmp_path / "b")).eval()
    assert torch.allclose(logits(back), expected, atol=1e-5)
    kept = back.peft_config["default"]
    assert kept.ensure_weight_tying
    again = tied_llama()
    assert reparam.load(again, tmp_path / "b").tied == {HEAD: EMBEDDING}
    assert torch.equal(logits(again), logits(model))


def test_an_adapter_of_ours_is_tied_in_peft(tmp_path: Path) -> None:
    model, adapter = adapted(alpha_pattern={"wte": 5}, model=gpt2(tied=True), targets=["wte", "c_attn"])
    adapter.save(tmp_path / "a", format="peft")
    found = peft.PeftModel.from_pretrained(gpt2(tied=True), str(tmp_path / "a")).eval()
    assert torch.allclose(logits(found), logits(model), rtol=1e-4, atol=1e-4)
    head = found.base_model.model.lm_head.lora_B["default"].weight
    embedding = found.base_model.model.transformer.wte.lora_embedding_A["default"]
    assert head.data_ptr() == embedding.data_ptr()


def test_where_nothing_is_tied_peft_trains_two_updates(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no tied modules were found"):
        expected = in_peft(tmp_path, llama, target_modules=["embed_tokens", "lm_head"])
    model = llama()
    assert reparam.load(model, tmp_path).tied == {}
    assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize("part", ["embed_tokens", "lm_head"])
def test_a_whole_tied_module_is_read_at_both_places(part: str, tmp_path: Path) -> None:
    expected = in_peft(tmp_path, tied_llama, target_modules=["q_proj"], modules_to_save=[part])
    model = tied_llama()
    adapter = reparam.load(model, tmp_path)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    adapter.save(tmp_path / "ours", format="peft")
    back = peft.PeftModel.from_pretrained(tied_llama(), str(tmp_path / "ours")).eval()
    assert torch.allclose(logits(back), expected, atol=1e-5)
    reparam.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.allclose(logits(model), expected, atol=1e-5)
    model = tied_llama()
    reparam.untie(model)
    reparam.load(model, tmp_path)
    assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize("part", ["embed_tokens", "lm_head"])
def test_a_whole_tied_module_trains_one_copy(part: str, tmp_path: Path) -> None:
    model, plain = tied_llama(), tied_llama()
    before = logits(model)
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets=["q_proj", part], modules_to_save=[part], tie=True)
    assert torch.equal(logits(model), before)
    whole = [p for name, p, _ in adapter.named_parameters() if "q_proj" not in name]
    assert [p.shape for p in whole] == [(97, 32)]
    model(input_ids=IDS, labels=IDS).loss.backward()
    plain(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(whole[0].grad, plain.model.embed_tokens.weight.grad)
    with torch.no_grad():
        whole[0] += 0.1 * torch.randn(97, 32, generator=torch.Generator().manual_seed(0))
        plain.model.embed_tokens.weight.copy_(whole[0])
    expected = logits(plain)
    assert torch.allclose(logits(model), expected, atol=1e-6)
    assert not torch.allclose(before, expected, atol=1e-2)
    adapter.save(tmp_path / "a")
    model.save_pretrained(tmp_path / "whole")
    for folder in ("a", "whole"):
        again = tied_llama()
        found = reparam.load(again, tmp_path / folder, trainable=True)
        assert torch.allclose(logits(again), expected, atol=1e-6)
        assert len(found.parameters()) == len(adapter.parameters())
        with reparam.select(again, ["default", None, "default"]):
            mixed = logits(again)
        assert torch.allclose(mixed[[0, 2]], expected[[0, 2]], atol=1e-5)
        assert torch.allclose(mixed[1], before[1], atol=1e-5)
        reparam.merge(again)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert torch.allclose(logits(again), expected, atol=1e-6)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(logits(stock), before)
    twin = copy.deepcopy(model)
    assert len(reparam.adapters(twin)["default"].parameters()) == len(adapter.parameters())
    reparam.remove(model, "default")
    assert torch.equal(logits(model), before)


def test_peft_has_no_other_ties(tmp_path: Path) -> None:
    _, adapter = adapted("dora")
    with pytest.raises(reparam.FormatError, match=r"PEFT ties only a LoRA on an output head .* format='reparam'"):
        adapter.save(tmp_path / "a", format="peft")
    assert not (tmp_path / "a").exists()


# ---- sums, compression, the command line


def test_sums_keep_the_tie(tmp_path: Path) -> None:
    _, one = adapted(targets=["embed_tokens"])
    two = reparam.attach(tied_llama(), reparam.LoRA(r=3), targets=["v_proj"])
    scramble(two)
    one.save(tmp_path / "one")
    two.save(tmp_path / "two")
    found = tied_llama()
    placed = reparam.blend([tmp_path / "one", tmp_path / "two"], [1.0, 0.5]).put(found)
    assert placed.tied == {HEAD: EMBEDDING}
    plain = by_hand(one, tied_llama())
    with torch.no_grad():
        for path, update in two.updates.items():
            a, b, _ = update.factors(two.modules[path].frozen)
            plain.get_submodule(path).weight += 0.5 * b.double() @ a.double()
    assert torch.allclose(logits(found).double(), logits(plain), atol=1e-4)
    small = reparam.compress(tmp_path / "one", rank=2).record
    assert set(small.tied) == {HEAD}

    alone = tied_llama()
    reparam.untie(alone)
    apart = reparam.attach(alone, reparam.LoRA(r=2), targets=["lm_head"])
    apart.save(tmp_path / "apart")
    with pytest.raises(reparam.FormatError, match=r"changes lm_head or model\.embed_tokens alone"):
        reparam.blend([tmp_path / "one", tmp_path / "apart"], [1.0, 1.0])


def test_a_run_trains_and_opens_a_tied_adapter(base: str, rows: str, tmp_path: Path) -> None:
    code = command.reparam(
        *("train", "--base", base, "--data", rows, "-o", str(tmp_path / "out"), "--ensure_weight_tying"),
        *(
            "--target_modules",
            "embed_tokens,q_proj",
            "--max_steps",
            "2",
            "--data.score_rows",
            "0",
            "--max_length",
            "64",
        ),
    )
    assert code == 0
    model, _, adapter = open_model(base, tmp_path / "out")
    assert adapter is not None
    assert adapter.tied == {HEAD: EMBEDDING}
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lm_head": {"to": "nowhere", "kind": "linear"}}, r"tied\['lm_head'\]\.to: expected the path of a site"),
        (
            {"lm_head": {"to": EMBEDDING, "kind": "vector"}},
            "lm_head is linear, 97 x 32, in this model",
        ),
        ({"elsewhere": {"to": EMBEDDING, "kind": "linear"}}, "lacks 1 module of the adapter .first: elsewhere"),
        ({"lm_head": EMBEDDING}, "tied"),
        ({EMBEDDING: {"to": EMBEDDING, "kind": "linear"}}, "name a module twice"),
    ],
)
def test_damaged_ties_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    _, adapter = adapted()
    adapter.save(tmp_path)
    file = tmp_path / native.CONFIG
    values = json.loads(file.read_text())
    values["tied"] = change
    values["digest"] = native._digest(values)
    file.write_text(json.dumps(values))
    with pytest.raises(reparam.FormatError, match=said):
        reparam.load(tied_llama(), tmp_path)
