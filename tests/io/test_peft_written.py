"""Adapters saved in PEFT's format, loaded by PEFT; both directions for many ranks, alphas and patterns."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import assert_equal_but_for_rounding, trained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import bert, gpt2, llama, logits, t5, tied_llama
from safetensors.torch import load_file
from torch import Tensor, nn

import reparam
from reparam import DoRA, LoRA, LoRABias
from reparam.io.peft import CONFIG, WEIGHTS

CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "alpha over r": (llama, {"method": LoRA(r=3, alpha=7)}),
    "alpha": (llama, {"method": LoRA(r=3, alpha=0.7, scaling="alpha")}),
    "rslora": (llama, {"method": LoRA(r=3, alpha=7, scaling="rslora")}),
    "no scale": (llama, {"method": LoRA(r=3, scaling="none")}),
    "patterns": (
        llama,
        {"method": LoRA(r=4, rank_pattern={"q_proj": 2, r".*\.1\.mlp\..*": 5}, alpha_pattern={"k_proj|v_proj": 3.5})},
    ),
    "alpha with patterns": (
        llama,
        {"method": LoRA(r=4, alpha=2, scaling="alpha", rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 0.3})},
    ),
    "dora": (llama, {"method": DoRA(r=3, alpha=7)}),
    "dora without scale, exact": (llama, {"method": DoRA(r=3, scaling="none", gradient="exact", dropout=0.1)}),
    "dora on conv1d, with biases": (gpt2, {"method": DoRA(r=2), "bias": True}),
    "biases of B": (gpt2, {"method": LoRABias(r=3, alpha=7)}),
    "biases of B without others": (llama, {"method": LoRABias(r=3, alpha=7), "targets": ["q_proj", "up_proj"]}),
    "attention": (llama, {"method": LoRA(r=2), "targets": "attention"}),
    "one site": (llama, {"method": LoRA(r=2), "targets": "model.layers.1.mlp.up_proj"}),
    "dropout": (llama, {"method": LoRA(r=2, dropout=0.5)}),
    "conv1d": (gpt2, {"method": LoRA(r=2)}),
    "conv1d and linear": (gpt2, {"method": LoRA(r=2), "targets": ["c_attn", "lm_head"]}),
    "biases": (gpt2, {"method": LoRA(r=2), "bias": True}),
    "embedding": (llama, {"method": LoRA(r=2), "targets": ["embed_tokens", "q_proj"]}),
    "embeddings and conv1d": (gpt2, {"method": LoRA(r=2), "targets": ["wte", "wpe", "c_attn"]}),
    "head": (llama, {"method": LoRA(r=2), "targets": ["lm_head"]}),
    "whole head": (llama, {"method": LoRA(r=2), "modules_to_save": ["lm_head"]}),
    "whole norm": (llama, {"method": LoRA(r=2), "modules_to_save": ["model.norm"]}),
    "whole norm with a bias": (gpt2, {"method": LoRA(r=2), "modules_to_save": ["ln_f", "lm_head"]}),
    "tied base": (tied_llama, {"method": LoRA(r=2)}),
    "encoder": (bert, {"method": LoRA(r=2), "bias": True, "modules_to_save": ["classifier", "pooler"]}),
    "encoder and decoder": (t5, {"method": LoRA(r=2), "targets": ["q", "v", "wi"]}),
}


def in_peft(model: nn.Module, folder: Path) -> Any:
    """The adapter loaded by PEFT; warnings are errors, except transformers' own deprecation warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*merging LoRA weights won't be possible")  # by PEFT
        if (folder / CONFIG).read_text().count("lm_head") and hasattr(model, "transformer"):
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # nn.Linear beside Conv1D: one flag
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


@pytest.mark.parametrize("case", CASES)
def test_peft_gives_our_logits(case: str, tmp_path: Path) -> None:
    make, settings = CASES[case]
    model = make()
    before = logits(model)
    adapter = trained(model, **{"targets": "all-linear", **settings})
    expected = logits(model)
    adapter.save(tmp_path / "out", format="peft")
    assert_equal_but_for_rounding(logits(in_peft(make(), tmp_path / "out")), expected)
    assert (before - expected).abs().max() > 0.05


@pytest.mark.parametrize("case", CASES)
def test_comes_back_to_us_unchanged(case: str, tmp_path: Path) -> None:
    make, settings = CASES[case]
    model = make()
    adapter = trained(model, **{"targets": "all-linear", **settings})
    adapter.save(tmp_path / "out", format="peft")
    again = make()
    found = reparam.load(again, tmp_path / "out")
    assert found.tensors().keys() == adapter.tensors().keys()
    assert all(torch.equal(found.tensors()[key], value) for key, value in adapter.tensors().items())
    assert found.method.settings()["dropout"] == adapter.method.settings()["dropout"]
    with torch.no_grad():  # with gradients, T5's attention picks another kernel
        assert torch.equal(logits(again), logits(model))


def test_names_modules_as_briefly_as_it_can(tmp_path: Path) -> None:
    def targets(name: str, **settings: Any) -> object:
        trained(llama(), method=LoRA(r=2), **settings).save(tmp_path / name, format="peft")
        return json.loads((tmp_path / name / CONFIG).read_text())["target_modules"]

    assert targets("a", targets=["q_proj", "v_proj"]) == ["q_proj", "v_proj"]
    assert targets("b", targets="re:.*1.*q_proj") == ["model.layers.1.self_attn.q_proj"]


def test_a_head_tied_to_the_embedding(tmp_path: Path) -> None:
    """If the head was untied to adapt it, PEFT adapts only one side too, and warns."""
    model = tied_llama()
    reparam.untie(model)
    adapter = trained(model, method=LoRA(r=2), targets=["lm_head"])
    adapter.save(tmp_path / "out", format="peft")
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        found = peft.PeftModel.from_pretrained(tied_llama(), str(tmp_path / "out")).eval()
    assert_equal_but_for_rounding(logits(found), logits(model))


def test_holds_nothing_of_the_base(tmp_path: Path) -> None:
    trained(llama(), method=LoRA(r=2), targets=["embed_tokens"]).save(tmp_path / "out", format="peft")
    assert {key.rsplit(".", 1)[1] for key in load_file(tmp_path / "out" / WEIGHTS)} == {
        "lora_embedding_A",
        "lora_embedding_B",
    }


class Net(nn.Module):
    """Linear maps with the same name endings: `q`, `block.0.q`, `block.10.q`, `other.block.0.q`."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.q = nn.Linear(6, 6)
            self.block = nn.ModuleDict({i: nn.ModuleDict({n: nn.Linear(6, 6) for n in ("q", "up")}) for i in "01"})
            self.block["10"] = nn.ModuleDict({"q": nn.Linear(6, 6)})
            self.other = nn.ModuleDict({"block": nn.ModuleDict({"0": nn.ModuleDict({"q": nn.Linear(6, 6)})})})
            self.last_q = nn.Linear(6, 6)
            self.norm = nn.LayerNorm(6)
            self.post_norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        for path in (*SITES, "norm", "post_norm"):
            x = torch.tanh(self.get_submodule(path)(x)) + x
        return x


SITES = ["q", "block.0.q", "block.0.up", "block.1.q", "block.1.up", "block.10.q", "other.block.0.q", "last_q"]
X = torch.linspace(-1, 1, 24).view(4, 6)
PATTERNS = [
    "q",
    r"block\.0\.q",
    r"^block\.0\.q",
    r"^q",
    "up",
    r"block\.\d+\.q",
    r"block\.1.*",
    "last_q|up",
    r".*0\.q",
    "^other.block.0.q",
]
ranks = st.integers(1, 6)
alphas = st.one_of(st.integers(1, 40), st.floats(0.1, 40))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    r=ranks,
    alpha=alphas,
    scaling=st.sampled_from(["alpha_over_r", "alpha", "rslora", "none"]),
    sites=st.lists(st.sampled_from(SITES), min_size=1, unique=True),
    rank_pattern=st.dictionaries(st.sampled_from(PATTERNS), ranks, max_size=3),
    alpha_pattern=st.dictionaries(st.sampled_from(PATTERNS), alphas, max_size=3),
)
def test_ours_in_peft(
    tmp_path: Path, r: int, alpha: float, scaling: str, sites: list[str], rank_pattern: Any, alpha_pattern: Any
) -> None:
    model = Net()
    patterns = [
        {p: v for p, v in found.items() if any(re.fullmatch(rf"(.*\.)?({p})", site) for site in sites)}
        for found in (rank_pattern, alpha_pattern)
    ]
    method = LoRA(r=r, alpha=alpha, scaling=scaling, rank_pattern=patterns[0], alpha_pattern=patterns[1])
    adapter = trained(model, method=method, targets="re:" + "|".join(re.escape(site) for site in sites))
    assert adapter.sites.keys() == set(sites)
    adapter.save(tmp_path / "out", format="peft")
    found = in_peft(Net(), tmp_path / "out")
    assert_equal_but_for_rounding(found(X), model(X))
    again = Net()
    reparam.load(again, tmp_path / "out")
    assert_equal_but_for_rounding(again(X), model(X))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    r=ranks,
    lora_alpha=alphas,
    use_rslora=st.booleans(),
    targets=st.one_of(
        st.lists(st.sampled_from([*SITES, "up"]), min_size=1, unique=True),
        st.sampled_from([r".*q", r"block\.\d\.(q|up)", "q|up|last_q", "all-linear"]),
    ),
    excluded=st.one_of(st.none(), st.just([]), st.just(["block.0.q"]), st.just(r"block\.1\..*")),
    rank_pattern=st.dictionaries(st.sampled_from(PATTERNS), ranks, max_size=3),
    alpha_pattern=st.dictionaries(st.sampled_from(PATTERNS), alphas, max_size=3),
)
def test_pefts_in_ours(tmp_path: Path, targets: Any, excluded: Any, **config: Any) -> None:
    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=targets, exclude_modules=excluded, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 if parameter.requires_grad else 0
    model.save_pretrained(str(tmp_path / "theirs"))
    found = Net()
    try:
        expected = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "theirs"))(X)
    except RuntimeError:  # sizes do not match: PEFT sorts the patterns when it saves, and the first match counts
        with pytest.raises(reparam.FormatError, match="according to r and rank_pattern"):
            reparam.load(found, tmp_path / "theirs")
        return
    reparam.load(found, tmp_path / "theirs")
    assert_equal_but_for_rounding(found(X), expected)


def test_modules_to_save_that_peft_cannot_tell_apart(tmp_path: Path) -> None:
    adapter = trained(Net(), method=LoRA(r=1), targets=["up"], modules_to_save=["norm"])
    with pytest.raises(reparam.FormatError, match="'norm' would also match post_norm"):
        adapter.save(tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()
