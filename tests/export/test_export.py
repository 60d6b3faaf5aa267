"""Exports, read back by PEFT, the gguf package and transformers, or by the formulas of mlx-lm, and compared."""

import json
from pathlib import Path
from typing import Any

import gguf
import peft
import pytest
import torch
from adapters import trained
from command import reparam as command
from models import IDS, save_base
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

import reparam
from reparam import AdaLoRA, DoRA, Full, LoRA
from reparam.hf.models import load_base

EVERYWHERE = ["q_proj", "k_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("untied") / "model"
    save_base(folder, tie_word_embeddings=False)
    return str(folder)


def saved(folder: Path, base: str, method: Any, targets: Any = EVERYWHERE) -> Tensor:
    """Save an adapter with nonzero values on this base; the logits with it."""
    model = load_base(base, dtype="float32").eval()
    adapter = trained(model, method=method, targets=targets)
    adapter.save(folder)
    with torch.no_grad():
        return model(IDS).logits


def run(tmp_path: Path, base: str, method: Any, to: str, *more: object, targets: Any = EVERYWHERE) -> Tensor:
    expected = saved(tmp_path / "adapter", base, method, targets)
    command_line = ["export", tmp_path / "adapter", tmp_path / "out", "--to", to, "--base", base, *more]
    assert command(*command_line, "--dtype", "float32") == 0
    return expected


@pytest.mark.parametrize(
    "method",
    [LoRA(r=2, alpha=8), LoRA(r=2, scaling="rslora", rank_pattern={"q_proj": 4}), AdaLoRA(init_r=3, target_r=2)],
    ids=["lora", "patterns", "adalora"],
)
def test_vllm_is_a_plain_lora_of_an_allowed_rank(tmp_path: Path, untied: str, method: Any) -> None:
    expected = run(tmp_path, untied, method, "vllm")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (8, 8, "LORA")
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save", "lora_bias"):
        assert not settings.get(key), f"vLLM refuses or ignores {key}"
    model = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_a_plain_lora_loses_is_refused(tmp_path: Path, untied: str, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "adapter", untied, DoRA(r=2))
    call = ["export", tmp_path / "adapter", tmp_path / "out", "--to", "vllm", "--base", untied, "--dtype", "float32"]
    assert command(*call, "--rank", 8) == 2
    told = capsys.readouterr().err
    assert "would lose more than 1 % of its change" in told
    assert "--merged" in told
    assert not (tmp_path / "out").exists()
    assert command(*call, "--rank", 8, "--max-error", 0.9) == 0
    assert "approximate: LoRA of rank 8" in capsys.readouterr().out


def test_the_error_is_that_of_the_best_approximation(tmp_path: Path, untied: str) -> None:
    from reparam.export.changes import changes_of

    model = load_base(untied, dtype="float32")
    adapter = trained(model, method=DoRA(r=2), targets=["q_proj"])
    (path, change), *_ = changes_of(adapter, "vLLM").items()
    W = adapter.modules[path].frozen.dense().double()
    delta = adapter.updates[path].effective_weight(adapter.modules[path].frozen).detach().double() - W
    values = torch.linalg.svdvals(delta)
    for rank in (1, 5, len(values)):
        factors = change.at(rank)
        missed = (delta - factors.B @ factors.A).norm() / delta.norm()
        assert missed == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-5)
        assert change.error(rank) == pytest.approx(float(missed), abs=1e-5)


def test_a_full_change_takes_its_whole_rank(tmp_path: Path, untied: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, untied, Full(), "vllm", targets=["q_proj"])
    assert "exact: LoRA of rank 32" in capsys.readouterr().out


@pytest.mark.parametrize("method", [LoRA(r=2, rank_pattern={"q_proj": 3}), AdaLoRA(init_r=3, target_r=2)])
def test_gguf_adapter_holds_the_change_in_its_order(tmp_path: Path, untied: str, method: Any) -> None:
    run(tmp_path, untied, method, "gguf")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["general.architecture"] == "llama"
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()).double() for tensor in reader.tensors}

    model = load_base(untied, dtype="float32")
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    reparam.merge(reparam.load(model, tmp_path / "adapter").model)
    config = model.config
    processor = LlamaTensorProcessor(
        {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads}
    )
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "down_proj": "ffn_down"}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            part = "mlp" if ours == "down_proj" else "self_attn"
            key = f"model.layers.{layer}.{part}.{ours}.weight"
            expected = model.get_parameter(key).detach().double() - before[key]
            A, B = (tensors[f"blk.{layer}.{theirs}.weight.lora_{end}"] for end in "ab")
            scaled = (B @ A * (fields["adapter.lora.alpha"] / len(A))).numpy()
            found = processor.process(scaled, f"blk.{layer}.{theirs}.weight").weights
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gguf_model_is_read_by_transformers(tmp_path: Path, base: str, dtype: str) -> None:
    expected = saved(tmp_path / "adapter", base, DoRA(r=2))
    call = ["export", tmp_path / "adapter", tmp_path / "out", "--to", "gguf", "--merged", "--base", base]
    assert command(*call, "--dtype", dtype) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        found = model.eval()(IDS).logits
    if dtype == "float32":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:
        assert (found - expected).norm() < 0.05 * expected.norm()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    text = "def f(x):\n    return 1234 + it's <|end|>"
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(base)(text)["input_ids"]


@pytest.mark.parametrize("method", [LoRA(r=2, rank_pattern={"q_proj": 3}), DoRA(r=2)], ids=["lora", "dora"])
def test_mlx_computes_the_same_weights(tmp_path: Path, untied: str, method: Any) -> None:
    """By mlx-lm's formulas (`tuner/lora.py`, `tuner/dora.py`) in float64."""
    run(tmp_path, untied, method, "mlx", targets=["layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"])
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = {key: t.double() for key, t in load_file(tmp_path / "out" / "adapters.safetensors").items()}
    assert settings["num_layers"] == 1
    assert settings["lora_parameters"]["keys"] == ["mlp.up_proj", "self_attn.q_proj"]
    model = load_base(untied, dtype="float32")
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    reparam.merge(reparam.load(model, tmp_path / "adapter").model)
    for key in settings["lora_parameters"]["keys"]:
        path = f"model.layers.1.{key}"
        found = before[f"{path}.weight"] + (tensors[f"{path}.lora_a"] @ tensors[f"{path}.lora_b"]).T
        if settings["fine_tune_type"] == "dora":
            found = tensors[f"{path}.m"][:, None] * found / found.norm(dim=1, keepdim=True)
        expected = model.get_parameter(f"{path}.weight").detach().double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--to", "ollama"], "expected one of vllm, gguf, mlx"),
        (["--to", "vllm", "--rank", "7"], "takes only the ranks 1, 8, 16"),
        (["--to", "vllm", "--rank", "0"], "at least 1"),
        (["--to", "vllm", "--max-error", "nan"], "from 0 to 1"),
        (["--to", "gguf", "--merged", "--rank", "4"], "leave one of them out"),
    ],
)
def test_wrong_settings(
    tmp_path: Path, untied: str, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "adapter", untied, LoRA(r=2), ["q_proj"])
    assert command("export", tmp_path / "adapter", tmp_path / "out", "--base", untied, *more) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_what_is_no_linear_map_is_named(tmp_path: Path, untied: str, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "adapter", untied, LoRA(r=2), ["q_proj", "embed_tokens"])
    for to in ("vllm", "gguf", "mlx"):
        assert command("export", tmp_path / "adapter", tmp_path / "out", "--base", untied, "--to", to) == 2
        assert "model.embed_tokens" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_nothing_is_replaced_unasked(tmp_path: Path, untied: str) -> None:
    run(tmp_path, untied, LoRA(r=2), "gguf", targets=["q_proj"])
    again = ["export", tmp_path / "adapter", tmp_path / "out", "--to", "gguf", "--base", untied]
    assert command(*again) == 2
    assert command(*again, "--overwrite_output_dir") == 0
    assert command("export", tmp_path / "adapter", tmp_path / "adapter", "--to", "gguf", "--base", untied) == 2


def test_an_untrained_adapter_is_refused(tmp_path: Path, untied: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_base(untied)
    reparam.attach(model, LoRA(r=2)).save(tmp_path / "adapter")
    assert command("export", tmp_path / "adapter", tmp_path / "out", "--to", "vllm", "--base", untied) == 2
    assert "changes nothing" in capsys.readouterr().err
