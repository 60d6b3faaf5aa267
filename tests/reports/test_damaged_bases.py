"""A base is the model in its files, or refused: nothing is filled with random numbers, and NaN is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import reparam, train
from models import gpt2, llama, logits, mixtral, save_base, t5, tied_llama
from safetensors.torch import load_file, save_file
from transformers import LlamaModel

import reparam as library
from reparam.errors import BaseError
from reparam.hf.models import load_base, load_tokenizer

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def folder(tmp_path: Path, base: str) -> Path:
    return shutil.copytree(base, tmp_path / "model")


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def commands(folder: Path, rows: str) -> list[Callable[[], int]]:
    out = folder.parent / "out"
    return [
        lambda: train(str(folder), rows, out),
        lambda: reparam("generate", "def f(", "--base", folder),
        lambda: reparam("eval", rows, "--base", folder),
        lambda: reparam("quantize", folder, out),
    ]


@pytest.mark.parametrize("storage", [None, library.NF4()])
@pytest.mark.parametrize("name", [UP, NORM, "model.embed_tokens.weight"])
def test_a_missing_parameter_is_refused(folder: Path, name: str, storage: library.NF4 | None) -> None:
    change(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(BaseError, match=rf"{folder}: .*{name} is missing"):
        load_base(str(folder), storage=storage)


@pytest.mark.parametrize("storage", [None, library.NF4()])
def test_a_parameter_of_another_shape_is_refused(folder: Path, storage: library.NF4 | None) -> None:
    change(folder, lambda tensors: tensors.update({UP: tensors[UP][:, :-2]}))
    with pytest.raises(BaseError, match=rf"{UP} is \[64, 30\] in the files, but \[64, 32\] in the model"):
        load_base(str(folder), storage=storage)


def test_only_the_first_parameters_are_named(folder: Path) -> None:
    change(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers" in name])
    with pytest.raises(BaseError, match="; and 13 more") as caught:
        load_base(str(folder))
    assert "\n" not in str(caught.value)


def test_a_model_without_its_head_is_refused(tmp_path: Path) -> None:
    LlamaModel(llama().config).save_pretrained(tmp_path)
    with pytest.raises(BaseError, match=r"lm_head\.weight is missing"):
        load_base(str(tmp_path))


@pytest.mark.parametrize("build", [llama, tied_llama, gpt2, mixtral])
def test_complete_models_load_as_they_are(build: Callable[[], torch.nn.Module], tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_base(str(tmp_path))), logits(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [UP, NORM, "model.embed_tokens.weight"])
def test_nan_and_infinity_are_refused_with_the_name_of_the_tensor(
    folder: Path, rows: str, name: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))
    with pytest.raises(BaseError, match=name):
        load_base(str(folder))
    if value != value:  # NaN
        for command in commands(folder, rows):
            assert command() == 2
            assert name in capsys.readouterr().err
        assert not (folder.parent / "out").exists()


def test_the_largest_finite_values_are_accepted(folder: Path) -> None:
    change(folder, lambda tensors: tensors[UP].view(-1)[:2].copy_(torch.tensor([3.4e38, -3.4e38])))
    assert load_base(str(folder)).get_parameter(UP).max() == 3.4e38
    with pytest.raises(BaseError, match="or load it as bfloat16"):
        load_base(str(folder), dtype="float16")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated weights": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-900]),
    "no header": lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 200),
    "empty weights": lambda f: (f / "model.safetensors").write_bytes(b""),
    "weights are a folder": lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "tokenizer is a list": lambda f: (f / "tokenizer.json").write_text("[]"),
    "tokenizer is null": lambda f: (f / "tokenizer.json").write_text("null"),
    "tokenizer without a model": lambda f: (f / "tokenizer.json").write_text("{}"),
    "tokenizer is cut": lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text()[:-5000]),
    "tokenizer's config is a number": lambda f: (f / "tokenizer_config.json").write_text("3"),
    "config is a list": lambda f: (f / "config.json").write_text("[]"),
    "config is empty": lambda f: (f / "config.json").write_text(""),
    "config is binary": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
}
for key, value in (
    ("hidden_size", "32"),
    ("hidden_size", None),
    ("hidden_size", [32]),
    ("hidden_size", -32),
    ("num_attention_heads", 0),
    ("num_hidden_layers", {}),
    ("model_type", 7),
    ("dtype", "float99"),
    ("quantization_config", {"quant_method": "reparam", "storage": 3}),
    ("rope_parameters", "x"),
):
    DAMAGES[f"{key}: {value}"] = lambda f, key=key, value=value: (f / "config.json").write_text(
        json.dumps({**json.loads((f / "config.json").read_text()), key: value})
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_with_one_sentence(
    damage: str, folder: Path, rows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[damage](folder)
    with pytest.raises(BaseError, match=rf"^{folder}: [^\n]+$"):
        (load_base(str(folder)), load_tokenizer(str(folder)))
    for command in commands(folder, rows):
        assert command() == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert len(said.strip().splitlines()) == 1, said
    assert not (folder.parent / "out").exists()


def test_a_value_of_a_wrong_type_is_explained(folder: Path) -> None:
    for name, key, value, why in (
        ("config.json", "use_cache", 1.5, "field 'use_cache': TypeError: Field 'use_cache' expected"),
        ("generation_config.json", "pad_token_id", [], "a value in its JSON files is missing or of a wrong type: Type"),
    ):
        content = (folder / name).read_text()
        (folder / name).write_text(json.dumps(json.loads(content) | {key: value}))
        with pytest.raises(BaseError, match=f"{folder}: no causal language model could be loaded: .*{why}"):
            load_base(str(folder))
        (folder / name).write_text(content)


@pytest.mark.parametrize("value", ["abc", {}, 1.5, True, [1, "a"]])
def test_a_token_id_that_is_no_number(folder: Path, value: object) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": value}))
    with pytest.raises(BaseError, match=r"generation_config\.json: eos_token_id: expected the number of a token"):
        load_base(str(folder))


def test_an_encoder_decoder_is_no_causal_language_model(tmp_path: Path) -> None:
    t5().save_pretrained(tmp_path)
    with pytest.raises(BaseError, match="no causal language model"):
        load_base(str(tmp_path))


def test_tensors_that_the_model_does_not_use_are_no_error(tmp_path: Path) -> None:
    save_base(tmp_path)
    change(tmp_path, lambda tensors: tensors.update(extra=torch.zeros(2)))
    load_base(str(tmp_path))
