"""Experts in files for vLLM: a plain LoRA for each matrix of each expert, read by PEFT, which fuses them."""

from pathlib import Path

import peft
import pytest
import torch
from models import IDS, logits
from moe import build, trained

import reparam
from reparam.errors import ExportError
from reparam.export import vllm
from reparam.export.changes import changes_of


@pytest.mark.parametrize(
    ("kind", "names"), [("Mixtral", ("w1", "w3", "w2")), ("Qwen3Moe", ("gate_proj", "up_proj", "down_proj"))]
)
def test_each_expert_has_factors_of_its_own(kind: str, names: tuple[str, ...], tmp_path: Path) -> None:
    model = build(kind, num_hidden_layers=1)
    adapter = trained(reparam.attach(model, reparam.LoRA(r=8, alpha=4), targets=["experts", "q_proj"]))
    y = logits(model)
    vllm.write(tmp_path, adapter, changes_of(adapter, "vLLM", experts=True), 8)
    found = {name.rpartition(".")[2] for name in reparam.io.files.read(tmp_path).sites}
    assert found == {*names, "q_proj"}
    with torch.no_grad():
        judge = peft.PeftModel.from_pretrained(build(kind, num_hidden_layers=1), tmp_path).eval()(IDS).logits
    assert (judge - y).abs().max() < 1e-5 * y.abs().max()


def test_experts_that_vllm_takes_otherwise_are_refused(tmp_path: Path) -> None:
    adapter = trained(reparam.attach(build("GptOss", num_hidden_layers=1), reparam.LoRA(r=8), targets="experts"))
    with pytest.raises(ExportError, match=r"vLLM takes single experts only of a gate and an up.*--merged"):
        vllm.write(tmp_path / "a", adapter, changes_of(adapter, "vLLM", experts=True), 8)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ExportError, match="changes of linear maps only"):
        changes_of(adapter, "mlx-lm")
