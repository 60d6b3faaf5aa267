"""The command line over quantized bases: quantize, train, generate, eval, merge, inspect, and mistakes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from command import reparam, train
from transformers import AutoModelForCausalLM

import reparam as library
from reparam.core.registry import STORAGES
from reparam.sites.walk import storages_in


@pytest.fixture(scope="module")
def quantized(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "model"
    assert reparam("quantize", base, output) == 0
    return output


@pytest.fixture(scope="module")
def trained(base: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "out"
    assert train(base, rows, output, "--base.storage", "nf4") == 0
    return output


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The printed text, joined into one line."""
    out, err = capsys.readouterr()
    return " ".join((out + err).split())


def test_quantize_writes_a_model_and_says_what_it_takes(
    base: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert reparam("quantize", base, tmp_path / "a", "--block", 32, "--no-double") == 0
    assert "into nf4 (block=32, double=False)" in (said := told(capsys))
    assert "5 bits per entry; not quantized: model.embed_tokens.weight" in said
    assert reparam("inspect", tmp_path / "a", "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["settings"] == {"block": 32, "double": False}
    assert report["bits for each entry"] == 5
    assert reparam("inspect", tmp_path / "a") == 0
    assert "quantized 14 matrices into nf4" in told(capsys)
    assert reparam("quantize", tmp_path / "a", tmp_path / "b", "--block", 32, "--no-double") == 0
    assert "was already quantized; its quantized matrices were copied unchanged" in told(capsys)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_the_bits_of_the_paper_are_what_inspect_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4.5 and 4.126953125 bits if all blocks of statistics are full, plus a constant of 4 bytes per matrix."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).save_pretrained(tmp_path / "base")
    from reparam.hf.models import load_base, save_model

    for double, bits in ((False, 4.5), (True, 4.126953125 + 8 * 4 / 128**2)):
        model = load_base(str(tmp_path / "base"), storage=library.NF4(double=double))
        save_model(model, None, tmp_path / f"quantized{double}")
        assert reparam("inspect", tmp_path / f"quantized{double}", "--json") == 0
        (report,) = json.loads(capsys.readouterr().out)
        assert report["bits for each entry"] == bits


def test_a_quantized_folder_trains_as_packing_on_load_does(
    quantized: Path,
    trained: Path,
    rows: str,
    tmp_path: Path,
) -> None:
    assert train(str(quantized), rows, tmp_path / "out") == 0
    name = "adapter/adapter.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (trained / name).read_bytes()


def test_the_resolved_configuration_reproduces_a_quantized_run_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    assert reparam("train", "-c", trained / "config.toml", "-o", tmp_path / "again") == 0
    for name in ("adapter.safetensors", "adapter.json"):
        assert (tmp_path / "again" / "adapter" / name).read_bytes() == (trained / "adapter" / name).read_bytes()


def test_the_adapter_remembers_how_its_base_was_quantized(trained: Path) -> None:
    from reparam.hf.open import open_model

    (quantizing,) = json.loads((trained / "adapter/adapter.json").read_text())["base"]["packing"]
    assert quantizing["storage"] == "nf4"
    assert quantizing["settings"] == {"block": 64, "double": True}
    model, _, _ = open_model(None, trained)
    assert storages_in(model) == dict.fromkeys(quantizing["modules"], library.NF4())
    model, _, _ = open_model(None, trained, storage="int8")
    assert set(storages_in(model).values()) == {library.Int8()}
    model, _, _ = open_model(None, trained, storage="dense")
    assert storages_in(model) == {}


def test_generate_and_eval_use_the_storage_of_the_training(
    trained: Path,
    few: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert reparam("generate", "def f(a, b):", "-a", trained, "--max-new-tokens", 4) == 0
    capsys.readouterr()
    scores = {}
    for storage in (None, "nf4", "dense"):
        more = [] if storage is None else ["--storage", storage]
        assert reparam("eval", few, "-a", trained, "--json", *more) == 0
        scores[storage] = json.loads(capsys.readouterr().out)["adapter"][0]["value"]
    assert scores[None] == scores["nf4"] != scores["dense"]
    figures = json.loads((trained / "figures.json").read_text())
    assert figures["trained parameters"] > 0


def test_merging_says_onto_what(
    trained: Path,
    base: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert reparam("merge", tmp_path / "trained", "-a", trained) == 0
    assert "in nf4, as in training, dequantized; --onto original would use" in told(capsys)
    assert reparam("merge", tmp_path / "original", "-a", trained, "--onto", "original") == 0
    assert f"merged onto the original weights in the files of {base}" in told(capsys)
    assert reparam("merge", tmp_path / "quantized", "-a", trained, "--into", "nf4") == 0
    assert "quantized to nf4 again" in told(capsys)
    ids = torch.arange(5, 25)[None]
    logits = {}
    for name in ("trained", "original"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert storages_in(model) == {}
        logits[name] = model(ids).logits
    from reparam.hf.models import load_base
    from reparam.hf.open import open_model

    expected = open_model(None, trained)[0](ids).logits
    assert float((logits["trained"] - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert not torch.equal(logits["original"], logits["trained"])
    assert len(storages_in(load_base(str(tmp_path / "quantized")))) == 14


MISTAKES = {
    "block": (["quantize", "{base}", "{out}", "--block", "63"], "block=63: expected one of 32, 64, 128"),
    "setting": (
        ["quantize", "{base}", "{out}", "--storage", "int8", "--block", "32"],
        "base.block is a setting of the storage nf4, and base.storage is int8",
    ),
    "storage": (["quantize", "{base}", "{out}", "--storage", "nf5"], "unknown storage 'nf5' (did you mean 'nf4'?)"),
    "nothing": (
        ["quantize", "{base}", "{out}", "--storage", "dense"],
        "'dense' does not quantize; choose one of int8, nf4",
    ),
    "itself": (["quantize", "{base}", "{base}"], "is the folder of the base model"),
    "targets": (["quantize", "{base}", "{out}", "--targets", "q_prj"], "'q_prj' matches no module (did you mean"),
    "twice": (["quantize", "{quantized}", "{out}", "--storage", "int8"], "would lose precision twice"),
    "format": (["quantize", "{base}", "{out}", "--format", "gguf"], "format='gguf': expected 'reparam'"),
    "onto": (["merge", "{out}", "-a", "{trained}", "--onto", "base"], "onto='base': expected one of trained, original"),
    "both": (
        ["merge", "{out}", "-a", "{trained}", "--onto", "original", "--into", "nf4"],
        "--into needs the quantized weights that the adapter was trained on",
    ),
    "into": (["merge", "{out}", "-a", "{trained}", "--into", "int8"], "into='int8' needs matrices stored in int8"),
    "lost": (
        ["merge", "{out}", "-a", "{trained}", "-b", "{quantized}", "--onto", "original"],
        "so the dense values are lost; pass the original model with --base",
    ),
    "train": (
        ["train", "--base.path", "{base}", "--data.train", "x", "--base.storage", "nf4", "--base.block", "0"],
        "block=0: expected one of",
    ),
}


def test_quantize_takes_every_setting_of_every_storage(capsys: pytest.CaptureFixture[str]) -> None:
    assert reparam("quantize", "--help") == 0
    said = told(capsys)
    for name, storage in STORAGES.items():
        assert name in said or name == "dense"
        for field in dataclasses.fields(storage):
            assert f"--{field.name}" in said
            assert f"--base.{field.name}" in said


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    mistake: str,
    base: str,
    quantized: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, expected = MISTAKES[mistake]
    places = {"base": base, "quantized": quantized, "trained": trained, "out": tmp_path / "out"}
    assert reparam(*(argument.format(**places) for argument in arguments)) == 2
    said = told(capsys)
    assert expected in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
