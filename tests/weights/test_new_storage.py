"""A new storage is one class: a toy with its own setting supports everything that NF4 does."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import logits
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from toys import registered
from transformers import LlamaForCausalLM

import reparam
from reparam.cli.config_options import with_options
from reparam.compare.plan import read_plan
from reparam.core.base import Storage
from reparam.errors import BaseError, ConfigError
from reparam.hf.config import StorageConfig
from reparam.hf.models import load_base, save_model
from reparam.inspect.survival import kinds, survivals
from reparam.sites.walk import storages_in
from reparam.train.config import dump, resolve
from reparam.weights.dense import DenseWeight
from reparam.weights.quantized import QuantizedWeight, bits, check_quantizable, floats, frozen


@dataclasses.dataclass(frozen=True)
class Mine(Storage):
    """Toy storage: 16-bit integers, with one magnitude for each group of rows."""

    group: int = 32
    """Rows that share one magnitude."""

    def quantize(self, w: Tensor) -> "MineWeight":
        """Round `w` [O, I]."""
        check_quantizable(w, self.name)
        wide = w.detach().float()
        absmax = torch.stack([rows.abs().max() for rows in wide.split(self.group)])
        scale = absmax.repeat_interleave(self.group)[: len(w), None].clamp(min=1e-30)
        return MineWeight((wide / scale * 32767).round().to(torch.int16), absmax, self.group, w.dtype)


class MineWeight(QuantizedWeight):
    """A weight of `Mine`: integer codes and magnitudes."""

    def __init__(self, codes: Tensor, absmax: Tensor, group: int, dtype: torch.dtype) -> None:
        super().__init__((codes.shape[0], codes.shape[1]), dtype, codes.device)
        self.codes, self.absmax, self.group = frozen(codes), bits(absmax), group

    @property
    def storage(self) -> Mine:
        """The storage, with its group size."""
        return Mine(self.group)

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """W: the codes times the magnitudes."""
        scale = floats(self.absmax).repeat_interleave(self.group)[: self.out_features, None]
        return (self.codes.float() * (scale.clamp(min=1e-30) / 32767))[rows]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias."""
        return F.linear(x, self.dense().to(x.dtype), bias)

    def neighbors(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The steps [rows, I] from each entry to the next level up and down; 0 at the ends."""
        scale = floats(self.absmax).repeat_interleave(self.group)[: self.out_features, None] / 32767
        step = scale[rows].expand(-1, self.in_features)
        return torch.where(self.codes[rows] < 32767, step, 0), torch.where(self.codes[rows] > -32767, -step, 0)

    def coded(self, w: Tensor) -> "MineWeight":
        """The weight with new codes and the same magnitudes."""
        scale = floats(self.absmax).repeat_interleave(self.group)[: self.out_features, None].clamp(min=1e-30)
        codes = (w / scale * 32767).round().clamp(-32767, 32767).to(torch.int16)
        return MineWeight(codes, floats(self.absmax).clone(), self.group, self.dtype)

    def moved(self, steps: Tensor) -> "MineWeight":
        """Other codes."""
        return MineWeight(self.codes + steps, floats(self.absmax).clone(), self.group, self.dtype)


@pytest.fixture(autouse=True)
def _mine() -> Iterator[None]:
    with registered(mine=Mine):
        yield


def test_the_configuration_and_its_file(tmp_path: Path) -> None:
    config = resolve(None, {"base.storage": "mine", "base.group": "16"})
    assert config.base.quantization() == Mine(16)
    (tmp_path / "c.toml").write_text(dump(config))
    assert "group = 16" in dump(config)
    assert "block" not in dump(config)
    assert resolve(tmp_path / "c.toml", {}) == config
    assert resolve(None, {"base.storage": "mine"}).base.quantization() == Mine()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"base.storage": "mine", "base.grup": 16}, "unknown key base.grup (did you mean 'group'?)"),
        ({"base.storage": "mine", "base.block": 32}, "base.block is a setting of the storage nf4"),
        ({"base.storage": "nf4", "base.group": 16}, "base.group is a setting of the storage mine"),
        ({"base.storage": "mine", "base.group": "x"}, "base.group:"),
        ({"base.storage": "min", "base.dtype": "f"}, "did you mean 'mine'"),
        ({"base.storage": "mine", "base.settings": {}}, "unknown key base.settings"),
    ],
)
def test_mistakes(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(None, given)
    assert said in str(error.value)


def test_a_file_with_the_defaults_of_another_storage_is_read() -> None:
    """Older files have NF4's settings for every storage."""
    assert resolve(None, {"base.block": 64, "base.double": "true"}) == resolve(None, {})


def test_the_command_line_has_its_setting() -> None:
    seen: dict[str, Any] = {}

    def command(overrides: dict[str, Any]) -> None:
        seen.update(overrides)

    with_options(command)(base__storage="mine", base__group="16")
    assert resolve(None, seen).base.quantization() == Mine(16)


def test_a_comparison() -> None:
    common = {"base.path": "x", "data.train": "x", "base.group": 16, "compare.methods": "lora"}
    plan = read_plan(None, {**common, "compare.storages": "dense,mine"})
    assert [plan.config(c, {}).base.quantization() for c in plan.contestants] == [None, Mine(16)]


@pytest.mark.filterwarnings("ignore:targets")
def test_files(tmp_path: Path) -> None:
    models.save_base(tmp_path / "base")
    model = load_base(str(tmp_path / "base"), storage=Mine(16))
    assert set(storages_in(model).values()) == {Mine(16)}
    save_model(model, None, tmp_path / "quantized")
    held = {k: v for f in (tmp_path / "quantized").glob("*.safetensors") for k, v in load_file(f).items()}
    assert any(key.endswith("q_proj.weight.codes") for key in held)
    again = load_base(str(tmp_path / "quantized"), storage=Mine(16))
    assert storages_in(again) == storages_in(model)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(BaseError, match="quantized already"):
        load_base(str(tmp_path / "quantized"), storage=Mine(8))
    asked = StorageConfig(Mine(16), "all-linear")
    other = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=asked)
    assert torch.equal(logits(other.eval()), logits(model))


def test_a_merge_and_what_survives_it() -> None:
    model = models.llama()
    reparam.quantize(model, Mine(16))
    adapter = reparam.attach(model, reparam.LoRA(r=2))
    with torch.no_grad():
        for update in adapter.updates.values():
            update.B.normal_()  # type: ignore[union-attr, operator]
    record = adapter.record()
    report = reparam.merge(model, into="mine")
    assert set(storages_in(model).values()) == {Mine(16)}
    assert all(site.survival > 0.99 for site in report.sites)
    name = next(iter(record.sites))
    site = record.sites[name]
    weight = DenseWeight(torch.randn(site.out_features, site.in_features))
    assert {"mine nearest", "mine aware"} <= set(kinds())
    assert {"mine nearest", "mine aware"} <= survivals(record, name, weight).keys()


def test_storages_of_installed_packages(tmp_path: Path) -> None:
    """Found by their entry points; one that cannot be imported is a warning that names its package."""
    info = tmp_path / "their_pack-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-quantize\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[reparam.storages]\nbroken = their_missing\ntheirs = their_pack\n")
    (tmp_path / "their_pack.py").write_text(
        "import dataclasses\nfrom reparam.core.base import Storage\nfrom reparam.core.registry import storage\n"
        "@storage('theirs')\n@dataclasses.dataclass(frozen=True)\nclass Theirs(Storage):\n    depth: int = 3\n"
    )
    code = (
        f"import sys, warnings; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from reparam.train.config import resolve\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    print(resolve(None, {'base.storage': 'theirs', 'base.depth': 4}).base.quantization())\n"
        "    try: resolve(None, {'base.storage': 'nobody'})\n"
        "    except ValueError as error: print(error)\n"
        "print([str(w.message) for w in seen if 'their-quantize' in str(w.message)])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    lines = found.splitlines()
    assert lines[0] == "Theirs(depth=4)"
    assert "theirs" in lines[1]
    assert lines[2].count("failed to register") == 1
