"""Plans against torch's profiler: the peak of real steps on a CPU, within 1 %."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import reparam as command
from models import save_base
from sampled import FULL
from torch.profiler import ProfilerActivity, profile

from reparam.errors import ConfigError
from reparam.hf.chunked import ChunkedLoss
from reparam.plan.device import bytes_of
from reparam.plan.estimate import Estimator, plan
from reparam.plan.longest import Longest
from reparam.train.config import Config, resolve
from reparam.train.model import attached, loaded

ROWS, TOKENS = 2, 64


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four layers, so that the plan extrapolates; wide enough that tensors of a few bytes do not count."""
    folder = tmp_path_factory.mktemp("plan") / "model"
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "tie_word_embeddings": True}
    save_base(folder, **sizes)
    return str(folder)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One layer: a plan takes a dozen traces."""
    folder = tmp_path_factory.mktemp("shallow") / "model"
    save_base(folder, num_hidden_layers=1)
    return str(folder)


def configured(base: str, **keys: Any) -> Config:
    return resolve(
        None, {"base.path": base, "base.dtype": "float32", **{k.replace("__", "."): v for k, v in keys.items()}}
    )


def measured(config: Config) -> int:
    """Bytes of the model, and the most that two real steps have beside it."""
    model = loaded(config.base)
    adapter = attached(config, model, config.method)
    model.train()
    if config.run.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    losses = ChunkedLoss(model) if config.run.chunked_loss else contextlib.nullcontext()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        optimizer = torch.optim.AdamW(adapter.parameters())
        ids, mask = torch.zeros(ROWS, TOKENS, dtype=torch.int64), torch.ones(ROWS, TOKENS, dtype=torch.int64)
        mask[0, 0] = 0  # a row with padding
        with losses:
            for _ in range(2):
                model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    now = peak = 0
    events = (e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return sum(held.values()) + peak


@pytest.mark.parametrize(
    ("method", "storage", "checkpointing", "chunked"),
    [
        ("lora", "nf4", True, False),
        ("adalora", "int8", False, True),
        ("full", "dense", False, False),
        *([("lora", "dense", False, True), ("dora", "dense", True, True)] if FULL else []),
    ],
)
@pytest.mark.filterwarnings("ignore:targets")  # `full` leaves out tied weights
def test_the_peak_is_that_of_real_steps(
    deep: str, method: str, storage: str, checkpointing: bool, chunked: bool
) -> None:
    config = configured(
        deep,
        method__name=method,
        base__storage=storage,
        run__gradient_checkpointing=checkpointing,
        run__chunked_loss=chunked,
    )
    found = Estimator(config).peak(ROWS, TOKENS)
    assert found.total == pytest.approx(measured(config), rel=0.01)


def test_what_fits(shallow: str) -> None:
    config = configured(shallow)
    found, batch = Estimator(config), Longest(4, 32, 1.0, "here")
    limit = found.peak(4, 32).total
    made = plan(config, batch, limit=limit)
    assert made.fits
    assert made.largest["run.batch_size"] == 4
    assert found.peak(made.largest["run.batch_size"] + 1, 32).total > limit
    assert made.largest["data.max_length"] in (32, 33)
    assert not made.changes
    small = plan(config, batch, limit=limit // 2)
    assert not small.fits
    assert small.changes
    for change in small.changes:
        assert change.peak < small.peak.total
    assert small.changes[0].peak == min(change.peak for change in small.changes)


def test_the_command(shallow: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["plan", "--base.path", shallow, "--data.train", rows, "--batch_size", 2, "--plot", tmp_path / "plan.png"]
    assert command(*call, "--json", "--memory", "1MiB") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["fits"] is False
    assert found["peak"] == sum(found["parts"].values())
    assert found["largest"]["run.batch_size"] == 0
    assert len(found["changes"]) == 3
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--memory", "lots"], "expected an amount of memory"),
        (["--memory", "0GiB"], "above 0"),
        (["--method", "prefix"], "changes no weights"),
        (["--objective", "dpo"], "only sft"),
    ],
)
def test_wrong_settings(base: str, more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("plan", "--base.path", base, *more) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_amounts() -> None:
    assert bytes_of("24GiB") == 24 * 2**30
    assert bytes_of("80g") == 80 * 2**30


def test_a_base_that_is_quantized_in_its_files(shallow: str, tmp_path: Path) -> None:
    assert command("quantize", shallow, tmp_path / "nf4", "--storage", "nf4") == 0
    packed = Estimator(configured(str(tmp_path / "nf4"))).peak(ROWS, TOKENS)
    assert packed.parts == Estimator(configured(shallow, base__storage="nf4")).peak(ROWS, TOKENS).parts
    settings = tmp_path / "nf4" / "config.json"
    settings.write_text(settings.read_text().replace('"reparam"', '"gptq"'))
    with pytest.raises(ConfigError, match="quantized in a way that reparam plan does not know"):
        Estimator(configured(str(tmp_path / "nf4"))).peak(ROWS, TOKENS)
