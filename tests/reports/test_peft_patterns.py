"""Regular expressions in the files of adapters never hang."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from command import reparam as command
from models import llama, logits

import reparam
from reparam.io import files

EVIL = r"(\w+\.?)+!"
CONFIG = "adapter_config.json"


def saved(folder: Path, **changes: Any) -> torch.Tensor:
    """An adapter of PEFT, with these changes of its settings; its logits."""
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.eval().save_pretrained(str(folder))
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    return logits(model).detach()


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_pattern": {EVIL: 4}},
        {"alpha_pattern": {EVIL: 4}},
        {"exclude_modules": EVIL},
        {"target_modules": f"{EVIL}|.*[qv]_proj"},
        {"layers_pattern": [EVIL], "layers_to_transform": [0]},
        {"modules_to_save": [EVIL]},
        {"target_modules": r"^(?!.*vision)(?:.*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.x)"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_patterns_of_peft(changes: dict[str, Any], tmp_path: Path) -> None:
    expected = saved(tmp_path, **changes)
    model = llama()
    reparam.load(model, tmp_path)
    torch.testing.assert_close(logits(model).detach(), expected, atol=1e-5, rtol=1e-4)


def test_inspect_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, rank_pattern={EVIL: 4})
    assert command("inspect", str(tmp_path)) == 0


def test_patterns_of_our_files(tmp_path: Path) -> None:
    model = llama()
    method = reparam.LoRA(r=2, rank_pattern={rf"{EVIL}|q_proj": 1})
    reparam.attach(model, method, targets=["q_proj", "v_proj"]).save(tmp_path / "own")
    assert files.read(tmp_path / "own").method == method
    reparam.load(llama(), tmp_path / "own")


def test_back_references_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, rank_pattern={r"(q)\1": 4})
    with pytest.raises(reparam.FormatError, match=r"rank_pattern: .*groupref, which is not supported"):
        reparam.load(llama(), tmp_path)
