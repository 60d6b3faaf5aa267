"""`reparam compress` as a user meets it: what is printed, what is written, and one sentence for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapters import trained
from command import reparam
from transformers import AutoModelForCausalLM

from reparam import AdaLoRA, DoRA, LoRA
from reparam.io import files


@pytest.fixture(scope="module")
def folder(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("adapters")
    methods = {"lora": LoRA(r=4), "dora": DoRA(r=4), "adalora": AdaLoRA(init_r=4, target_r=4), "theirs": LoRA(r=4)}
    for name, method in methods.items():
        model = AutoModelForCausalLM.from_pretrained(base)
        trained(model, method=method).save(found / name, format="peft" if name == "theirs" else "reparam")
    return found


@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "theirs"])
def test_a_smaller_adapter_is_written(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reparam("compress", folder / name, tmp_path / "small", "--rank", 2) == 0
    told = capsys.readouterr().out
    assert "4 -> 2" in told
    assert "components     16 -> 8 on 4 sites" in told
    assert ("of B A, which the magnitudes scale" if name == "dora" else "of the change ΔW over all sites") in told
    tensors = files.read(tmp_path / "small").tensors
    assert {len(tensor) for key, tensor in tensors.items() if key.endswith(".A")} == {2}


def test_scores_before_and_after(
    folder: Path,
    base: str,
    few: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = tmp_path / "small"
    more = ["--data", few, "--base", base, "--format", "peft"]
    assert reparam("compress", folder / "lora", small, "--energy", 0.5, *more) == 0
    told = capsys.readouterr().out
    assert "original" in told
    assert "compressed" in told
    assert "loss per token" in told
    assert (small / "adapter_config.json").exists()
    assert reparam("eval", few, "--base", base, "--adapter", small) == 0
    again = capsys.readouterr().out
    scores = [next(line for line in text.splitlines() if "loss per token" in line) for text in (told, again)]
    assert scores[0].split("│")[3] == scores[1].split("│")[3]


def test_sites_that_leave_are_counted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reparam("compress", folder / "lora", tmp_path / "small", "--bytes", 500) == 0
    told = capsys.readouterr().out
    left = 4 - len(files.read(tmp_path / "small").sites)
    assert f"{left} of 4 sites dropped" in told
    assert "4 -> 0" in told


def test_nothing_to_drop_is_a_copy(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reparam("compress", folder / "lora", tmp_path / "same", "--rank", 8) == 0
    assert "every site keeps its rank: the adapter was copied bit for bit" in capsys.readouterr().out
    name = "adapter.safetensors"
    assert (tmp_path / "same" / name).read_bytes() == (folder / "lora" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected exactly one of energy, rank and bytes, found 0"),
        (["--rank", 1, "--bytes", 9], "found 2"),
        (["--energy", 2], "energy=2.0: expected a number"),
        (["--bytes", 9], "needs at least"),
        (["--rank", 1, "--base", "x"], "--base is for --data"),
        (["--rank", 1, "--format", "onnx"], "expected one of reparam, peft"),
    ],
)
def test_one_sentence_for_each_mistake(
    arguments: list[object], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reparam("compress", folder / "lora", tmp_path / "small", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_the_output_is_not_the_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reparam("compress", folder / "lora", folder / "lora", "--rank", 1) == 2
    assert "is the folder of the input adapter" in capsys.readouterr().err
