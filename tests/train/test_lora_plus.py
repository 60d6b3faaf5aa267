"""LoRA+ in whole runs: equal to LoRA at a ratio of one, printed output, refusals."""

from __future__ import annotations

import io
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_base
from rich.console import Console
from safetensors.torch import load_file
from stopping import Stopping

from reparam import LoRA
from reparam.cli import main
from reparam.errors import ConfigError
from reparam.train.config import dump, resolve
from reparam.train.job import Result
from reparam.train.optimizer import check_optimizer
from reparam.train.run import train
from reparam.train.sections import OptimConfig
from reparam.train.show import Show

ASSETS = Path(__file__).parents[2] / "assets"


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a short run with every kind of group: a tiny base with biases, and rows."""
    folder = tmp_path_factory.mktemp("lora_plus")
    save_base(folder / "base", attention_bias=True, tie_word_embeddings=False)
    lines = (ASSETS / "tasks" / "signatures" / "train.jsonl").read_text().splitlines()[:60]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "base.path": str(folder / "base"),
        "data.train": str(folder / "rows.jsonl"),
        "data.score_rows": 1,
        "adapter.targets": "q_proj,up_proj,embed_tokens",
        "adapter.modules_to_save": "model.norm",
        "adapter.bias": True,
        "optim.learning_rate": 0.002,
        "optim.weight_decay": 0.1,
        "run.max_steps": 4,
        "run.batch_size": 2,
    }


def go(common: dict[str, Any], output: Path, *, stop: int = 0, **optim: Any) -> tuple[Result, str]:
    """Run the training; returns the result and the printed text."""
    text = io.StringIO()
    console = Console(file=text, width=200)
    overrides = {**common, "run.output": str(output), **{f"optim.{key}": value for key, value in optim.items()}}
    show = Stopping(console, stop) if stop else Show(console)
    return train(resolve(None, overrides), show=show), text.getvalue()


def adapter_bytes(output: Path) -> bytes:
    return (output / "adapter" / "adapter.safetensors").read_bytes()


def test_a_ratio_of_one_is_lora_bit_for_bit(common: dict[str, Any], tmp_path: Path) -> None:
    """Weight decay, biases, a norm trained whole: the groups subdivide transformers' two. Files are equal."""
    linear = common | {"adapter.targets": "q_proj,up_proj"}
    _, printed = go(linear, tmp_path / "plain")
    go(linear, tmp_path / "one", lora_plus=1)
    assert adapter_bytes(tmp_path / "plain") == adapter_bytes(tmp_path / "one")
    described = [(tmp_path / name / "adapter" / "adapter.json").read_bytes() for name in ("plain", "one")]
    assert described[0] == described[1]
    assert "LoRA+" not in printed
    figures = json.loads((tmp_path / "plain" / "figures.json").read_text())
    assert (figures["LoRA+ ratio"], figures["LoRA+ groups"]) == (None, [])


def test_one_step_of_a_run_moves_b_ratio_times_as_far(common: dict[str, Any], tmp_path: Path) -> None:
    linear = common | {"adapter.targets": "q_proj", "run.max_steps": 1, "optim.schedule": "constant"}
    linear |= {"adapter.bias": False, "adapter.modules_to_save": "", "optim.weight_decay": 0.0}
    for ratio in (1, 16):
        go(linear, tmp_path / str(ratio), name="sgd", lora_plus=ratio, warmup=0, learning_rate=0.25)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("1", "16"))
    for name in one:
        factor = 16 if name.endswith(".B") else 1
        assert one[name].any()
        assert torch.equal(two[name], factor * one[name])


def test_a_run_shows_its_groups_and_paged_states_change_nothing(common: dict[str, Any], tmp_path: Path) -> None:
    _, printed = go(common, tmp_path / "torch", lora_plus=16, lora_plus_embedding=1e-4)
    pages = {"page": "4KiB", "budget": "12KiB"}
    go(common, tmp_path / "ours", name="paged_adamw_32bit", lora_plus=16, lora_plus_embedding=1e-4, **pages)
    assert adapter_bytes(tmp_path / "torch") == adapter_bytes(tmp_path / "ours")
    figures = json.loads((tmp_path / "ours" / "figures.json").read_text())
    assert figures["LoRA+ ratio"] == 16
    assert figures["paging"]["peak_resident"] < figures["paging"]["total"]
    rates = {g["name"]: (g["rate"], g["multiple"], g["weight_decay"]) for g in figures["LoRA+ groups"]}
    assert rates == {
        "in": (0.002, 1.0, 0.1),
        "embedding": (1e-4, 0.05, 0.1),
        "out": (0.032, 16.0, 0.1),
        "out, no decay": (0.032, 16.0, 0.0),
    }
    assert sum(g["parameters"] for g in figures["LoRA+ groups"]) == figures["trained parameters"]
    line = next(line for line in printed.splitlines() if "out, no decay" in line)
    assert [cell.strip() for cell in line.strip("│ ").split("│")][1:4] == ["0.032", "16", "0"]


def test_an_interrupted_run_ends_as_one_that_was_not(common: dict[str, Any], tmp_path: Path) -> None:
    settings = {"name": "paged_adamw_8bit", "page": "4KiB", "budget": "12KiB", "lora_plus": 16}
    go(common, tmp_path / "whole", **settings)
    stopped, _ = go(common, tmp_path / "broken", **settings, stop=2)
    assert stopped.signal == signal.SIGTERM
    for changed in (8, 32):
        with pytest.raises(
            ValueError, match=rf"out had 16 times the learning rate and now has {changed} times; .* set optim"
        ):
            go(common, tmp_path / "broken", **{**settings, "lora_plus": changed})
    go(common, tmp_path / "broken", **settings)
    assert adapter_bytes(tmp_path / "broken") == adapter_bytes(tmp_path / "whole")


def test_a_schedule_that_breaks_the_ratio_ends_the_run(common: dict[str, Any], tmp_path: Path) -> None:
    """GreedyLR's lowest rate, 0.001, is above A's initial rate; it ignores changes below 1e-8."""
    settings = {"schedule": "greedy", "warmup": 0, "learning_rate": 1e-4, "lora_plus_embedding": 1e-8}
    with pytest.raises(ValueError, match=r"LoRA\+: the learning rate of .*, because 'out' has"):
        go(common | {"run.max_steps": 16, "run.eval_every": 1}, tmp_path / "run", **settings, lora_plus=16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_plus": 0.0}, "optim.lora_plus: 0.0: expected a number above 0"),
        ({"lora_plus": math.nan}, "optim.lora_plus: nan: expected a number above 0"),
        (
            {"lora_plus": 4.0, "lora_plus_embedding": -1.0},
            "optim.lora_plus_embedding: -1.0: expected a finite number of at least 0",
        ),
        ({"lora_plus_embedding": 1e-5}, "optim.lora_plus_embedding has no effect without optim.lora_plus"),
    ],
    ids=str,
)
def test_mistakes_are_named_before_anything_is_read(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_optimizer(OptimConfig(**settings))


def test_nothing_to_give_the_ratio_to_is_named_before_anything_is_written(
    common: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"optim.lora_plus: LoRA\+: of 2 parameters none has the role 'out'"):
        go(common | {"adapter.targets": "embed_tokens", "adapter.modules_to_save": ""}, tmp_path / "run", lora_plus=16)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("default:method.name:UserWarning")
def test_the_command_line_takes_the_names_that_users_know(
    common: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [text for key, value in common.items() if key != "adapter.bias" for text in (f"--{key}", str(value))]
    options += ["--method", "lora++", "--loraplus_lr_ratio", "8", "--loraplus_lr_embedding", "1e-5"]
    monkeypatch.setattr("sys.argv", ["reparam", "train", *options, "-o", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "warning: method.name 'lora++' is taken for LoRA+ " in capsys.readouterr().err
    figures = json.loads((tmp_path / "run" / "figures.json").read_text())
    rates = {group["name"]: group["multiple"] for group in figures["LoRA+ groups"]}
    assert (rates["out"], rates["embedding"]) == (8, pytest.approx(1e-5 / 0.002))


@pytest.mark.parametrize("name", ["lora++", "LoRA++", "loraplusplus", "lora+", "loraplus"])
def test_its_names_as_a_method_are_lora_with_the_usual_ratio(name: str) -> None:
    with pytest.warns(UserWarning, match=r"is taken for LoRA\+ \(Hayou.*: LoRA with optim.lora_plus 16") as caught:
        config = resolve(None, {"method.name": name, "method.r": 4})
    assert ("only known method" in str(caught[0].message)) == name.endswith(("++", "plusplus"))
    assert (config.method, config.optim.lora_plus) == (LoRA(r=4), 16.0)
    assert 'name = "lora"' in dump(config)
    with pytest.warns(UserWarning, match="optim.lora_plus 4"):
        assert resolve(None, {"method.name": name, "optim.lora_plus": "4"}).optim.lora_plus == 4.0
