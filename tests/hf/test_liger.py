"""Liger's kernel gives the loss and the gradients of the chunks. It runs in Triton's interpreter, on the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import reparam
from reparam.errors import NotChunked
from reparam.hf import liger
from reparam.hf.chunked import ChunkedLoss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("liger_kernel") is not None
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 50,
}


def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


@pytest.mark.skipif(INTERPRETED or not INSTALLED, reason="Liger is not installed: pip install --no-deps liger-kernel")
def test_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run([*command, "-k", "kernel"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 passed" in done.stdout


@pytest.mark.skipif(not (INTERPRETED and INSTALLED), reason="runs in the interpreter")
@pytest.mark.parametrize(("smoothing", "trained"), [(0.0, False), (0.1, True)])
def test_the_kernel_gives_the_loss_of_the_chunks(smoothing: float, trained: bool) -> None:
    model = small()
    model.lm_head.weight.requires_grad_(trained)
    ids = torch.randint(0, 50, (2, 7))
    labels = ids.clone()
    labels[0, :4] = -100
    found = []
    for losses in (ChunkedLoss(model, smoothing=smoothing), liger.LigerLoss(model, smoothing=smoothing)):
        model.zero_grad()
        with losses:
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        found.append([loss.detach(), *(grad.clone() for grad in grads if grad is not None)])
    assert len(found[0]) == len(found[1])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_where_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    assert liger.chosen(model, smoothing=0.0, wish=None) is None
    assert liger.chosen(model, smoothing=0.0, wish=False) is None
    with pytest.raises(NotChunked, match="GPU"):
        liger.chosen(model, smoothing=0.0, wish=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotChunked, match="pip install liger-kernel"):
        liger.LigerLoss(model)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(NotChunked, match="changes its logits"):
        liger.LigerLoss(Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=3.0)))
    reparam.attach(model, "lora", r=2, targets=["lm_head"])
    with pytest.raises(NotChunked, match=r"plain nn\.Linear"):
        liger.LigerLoss(model)
