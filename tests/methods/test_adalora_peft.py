"""AdaLoRA compared with PEFT: the same run, the same files."""

import json
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from adalora_cases import SHORT, adapted, ranks, step
from models import logits

import reparam
from reparam import AdaLoRA

# ---- judged by PEFT


def test_a_run_is_pefts_run() -> None:
    """With the same initialization and batches, P, λ and Q agree with PEFT's after each step of the fall."""
    settings = {"init_r": 4, "tinit": 2, "tfinal": 3, "beta1": 0.85, "beta2": 0.85}
    config = peft.AdaLoraConfig(
        **settings,  # type: ignore[arg-type]
        target_r=2,
        deltaT=1,
        total_step=12,
        orth_reg_weight=0.4,
        lora_alpha=64,
        target_modules=["q_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",  # without it PEFT leaves the orthogonality term out
    )
    judge = peft.get_peft_model(models.llama(), config)
    model = models.llama()
    adapter = reparam.attach(
        model,
        AdaLoRA(**{**settings, "target_r": 2, "alpha": 64, "total_steps": 12, "orth_weight": 0.4}),
        targets=["q_proj", "up_proj", "down_proj"],
    )
    theirs = {
        f"{name}.{part}": getattr(judge.base_model.model.get_submodule(name), f"lora_{part}")["default"]
        for name in adapter.sites
        for part in "AEB"
    }
    with torch.no_grad():
        for name, p, _ in adapter.named_parameters():
            theirs[name].copy_(p.reshape(theirs[name].shape))
    ours = torch.optim.SGD(adapter.parameters(), lr=0.2)
    its = torch.optim.SGD([p for p in judge.parameters() if p.requires_grad], lr=0.2)
    adapter.bind(ours)
    for t in range(9):
        ids = torch.randint(0, 90, (2, 6), generator=torch.Generator().manual_seed(t))
        for net, optimizer in ((model, ours), (judge, its)):
            net(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            if net is judge:
                judge.base_model.update_and_allocate(t)
            optimizer.zero_grad()
        for name, p, _ in adapter.named_parameters():
            expected = theirs[name].detach().reshape(p.shape)
            assert torch.allclose(p, expected, rtol=1e-3, atol=1e-6), (t, name)


# ---- PEFT's files


def shrunk(**settings: Any) -> tuple[Any, reparam.Adapter]:
    """A model after a whole schedule, with different ranks in its sites."""
    make = settings.pop("make", models.llama)
    model, adapter, _ = adapted(make(), **settings)
    adapter.bind(optimizer := torch.optim.AdamW(adapter.parameters(), lr=3e-2))
    for t in range(10):
        step(model, optimizer, seed=t)
    return model.eval(), adapter


@pytest.mark.parametrize("make", [models.llama, models.gpt2])
@pytest.mark.parametrize("target", [2, 0.5])
def test_peft_computes_what_we_saved(make: Any, target: float, tmp_path: Path) -> None:
    model, adapter = shrunk(make=make, target_r=target)
    assert len(set(ranks(adapter))) > 1
    expected = logits(model)
    adapter.save(tmp_path / "out", format="peft")
    judge = peft.PeftModel.from_pretrained(make(), str(tmp_path / "out")).eval()
    assert (logits(judge) - expected).abs().max() <= 1e-5 * expected.abs().max()
    again = make()
    found = reparam.load(again, tmp_path / "out")
    assert found.tensors().keys() == adapter.tensors().keys()
    assert all(torch.equal(found.tensors()[key], value) for key, value in adapter.tensors().items())
    assert torch.equal(logits(again.eval()), expected)


def test_we_compute_what_peft_trained_and_pruned(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=3, total_step=8, lora_alpha=64, target_modules=["q_proj", "up_proj"]
    )
    judge = peft.get_peft_model(models.llama(), config)
    optimizer = torch.optim.AdamW([p for p in judge.parameters() if p.requires_grad], lr=3e-2)
    for t in range(8):
        ids = torch.randint(0, 90, (2, 6), generator=torch.Generator().manual_seed(t))
        judge(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        judge.base_model.update_and_allocate(t)
        optimizer.zero_grad()
    judge.save_pretrained(str(tmp_path / "out"))
    model = models.llama()
    adapter = reparam.load(model, tmp_path / "out")
    assert sum(ranks(adapter)) == 8
    expected = logits(judge.eval())
    assert (logits(model.eval()) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_peft_has_no_equal_of_is_refused(tmp_path: Path) -> None:
    _, adapter, _ = adapted(magnitude=True)
    with pytest.raises(reparam.FormatError, match="DoRA's magnitudes"):
        adapter.requires_grad_(False).save(tmp_path / "a", format="peft")
    adapter = reparam.attach(models.llama(), AdaLoRA(**SHORT), targets=["embed_tokens"])
    with pytest.raises(reparam.FormatError, match=r"the embedding model\.embed_tokens"):
        adapter.requires_grad_(False).save(tmp_path / "a", format="peft")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["rank_pattern"].update({next(iter(c["rank_pattern"])): [True]}), "rank_pattern keeps 1 of 1"),
        (lambda c: c.update(use_dora=True), "use_dora: PEFT's AdaLoRA has no magnitudes"),
        (lambda c: c.update(target_r=9), "target_r=9 is above init_r=4"),
        (lambda c: c.update(beta1=2.0), "beta1=2.0: expected a number between 0 and 1"),
        (lambda c: c.update(surprise=1), "surprise = 1: unknown"),
    ],
)
def test_damaged_files_of_peft_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    _, adapter = shrunk()
    adapter.save(tmp_path / "out", format="peft")
    file = tmp_path / "out" / "adapter_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    with pytest.raises(reparam.FormatError, match=message):
        reparam.load(models.llama(), tmp_path / "out")
