"""PEFT settings that reparam does not support, and contradictory files: errors that name the problem."""

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import frozen, gpt2, llama, logits, same
from safetensors.torch import load_file, save_file
from torch import Tensor

import reparam
from reparam.io import peft_config
from reparam.io.peft import CONFIG, WEIGHTS

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of an intact adapter."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0, 0.1)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def refused(folder: Path, *words: str, model: Any = None) -> str:
    """Assert that loading raises FormatError with all these words, and leaves the model unchanged."""
    model = model or llama()
    before, text = frozen(model), str(model)
    with pytest.raises(reparam.FormatError) as caught:
        reparam.load(model, folder)
    assert same(frozen(model), before)
    assert str(model) == text
    assert not hasattr(model, "reparam_state")
    message = str(caught.value)
    assert str(folder) in message
    for word in words:
        assert word in message
    return message


def test_every_key_of_peft_is_known() -> None:
    """A key added by a new PEFT release fails this test until it is handled."""
    honored = {field.name for field in dataclasses.fields(peft_config.Honored)}
    known = [*honored, *peft_config.NEUTRAL, *peft_config.REFUSED]
    assert len(known) == len(set(known))
    assert set(known) == {field.name for field in dataclasses.fields(peft.LoraConfig)}


def test_defaults_are_pefts() -> None:
    theirs = peft.LoraConfig()
    for field in dataclasses.fields(peft_config.Honored):
        if field.name == "peft_version":  # of the file, not a setting
            continue
        assert field.default == (getattr(theirs, field.name) or field.default), field.name


@pytest.mark.parametrize("key", peft_config.REFUSED)
def test_key_is_refused(folder: Path, key: str) -> None:
    edit(folder, **{key: [1]})
    refused(folder, CONFIG, f"{key} = [1]")


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        peft.LoHaConfig(target_modules=["q_proj"]),
        peft.LoKrConfig(target_modules=["q_proj"]),
        peft.VeraConfig(target_modules=["q_proj"]),
        peft.OFTConfig(target_modules=["q_proj"]),
        peft.PromptTuningConfig(num_virtual_tokens=2),
        peft.PolyConfig(target_modules=["q_proj"]),
        peft.XLoraConfig(hidden_size=8, adapters={"a": "x"}),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_type_is_refused(folder: Path, config: Any) -> None:
    config.save_pretrained(str(folder))
    refused(folder, CONFIG, f"peft_type {config.peft_type.value!r}")


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_replication": [(0, 1)]},
        {"alora_invocation_tokens": [1]},
        {"kasa_config": peft.KasaConfig()},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "lora_ga"},
    ],
    ids=str,
)
def test_setting_is_refused_as_peft_writes_it(folder: Path, changes: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4, **changes).save_pretrained(str(folder))
    refused(folder, CONFIG, next(iter(changes)))


def test_loftq(folder: Path) -> None:
    edit(folder, init_lora_weights="loftq")  # PEFT itself writes it only where scipy is installed
    refused(folder, CONFIG, "init_lora_weights")


def test_key_of_a_later_release(folder: Path) -> None:
    edit(folder, use_magic=True, peft_version="9.0.0")
    refused(folder, "use_magic = True", "9.0.0")
    edit(folder, use_magic=None)
    reparam.load(llama(), folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", "8"),
        ("r", 4.5),
        ("r", True),
        ("lora_alpha", -1),
        ("lora_alpha", None),
        ("lora_alpha", float("nan")),
        ("lora_dropout", 1.0),
        ("bias", "some"),
        ("rank_pattern", {"q_proj": "2"}),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"(": 2}),
        ("alpha_pattern", {"q_proj": -1}),
        ("alpha_pattern", {"*": 2}),
        ("target_modules", "("),
        ("target_modules", 3),
        ("exclude_modules", "["),
        ("modules_to_save", "lm_head"),
        ("layers_to_transform", "1"),
        ("use_rslora", 1),
    ],
)
def test_value_is_refused(folder: Path, key: str, value: Any) -> None:
    edit(folder, **{key: value})
    refused(folder, CONFIG, "alpha" if key == "lora_alpha" else "dropout" if key == "lora_dropout" else key)


def tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    found = load_file(folder / WEIGHTS)
    change(found)
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})


def test_rank_and_file_disagree(folder: Path) -> None:
    edit(folder, r=8)
    refused(folder, "rank 4 in adapter_model.safetensors, but 8 according to r and rank_pattern")


def test_missing_half(folder: Path) -> None:
    tensors(folder, lambda found: found.pop(f"{PREFIX}.lora_B.weight"))
    refused(folder, WEIGHTS, f"missing {PREFIX}.lora_B.weight")


def test_missing_site(folder: Path) -> None:
    """The settings name q_proj and up_proj, and one layer's up_proj is missing; PEFT loads it silently."""

    def drop(found: Tensors) -> None:
        for key in [key for key in found if ".layers.1.mlp.up_proj" in key]:
            del found[key]

    tensors(folder, drop)
    refused(folder, "model.layers.1.mlp.up_proj")


def test_missing_whole_module(folder: Path) -> None:
    edit(folder, modules_to_save=["lm_head"])
    refused(folder, "lm_head")


def test_no_factors(folder: Path) -> None:
    save_file({"base_model.model.lm_head.weight": torch.zeros(97, 32)}, folder / WEIGHTS)
    refused(folder, WEIGHTS, "no LoRA factors")


@pytest.mark.parametrize(
    "key",
    [
        f"{PREFIX}.lora_magnitude_vector",
        f"{PREFIX}.lora_B.bias",
        "base_model.model.model.layers.0.mlp.down_proj.base_layer.bias",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.nowhere.weight",
    ],
)
def test_extra_tensor(folder: Path, key: str) -> None:
    tensors(folder, lambda found: found.update({key: torch.zeros(32)}))
    refused(folder, "unknown tensor", key.removeprefix("base_model.model."))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(32, 5), "do not match"),
        (torch.zeros(31, 4), "the adapter was trained on linear, 31 x 32"),
        (torch.zeros(32), "do not match"),
        (torch.zeros(32, 4, 1, 1), "do not match"),
        (torch.zeros(32, 4, dtype=torch.int32), "torch.int32"),
        (torch.full((32, 4), float("nan")), "NaN or infinity"),
        (torch.full((32, 4), float("inf")), "NaN or infinity"),
    ],
    ids=str,
)
def test_bad_factor(folder: Path, value: Tensor, words: str) -> None:
    tensors(folder, lambda found: found.update({f"{PREFIX}.lora_B.weight": value}))
    refused(folder, "self_attn.q_proj", words)


def test_another_architecture(folder: Path) -> None:
    refused(folder, "model.layers.", "_proj", "GPT2LMHeadModel", model=gpt2())


def test_other_sizes(folder: Path) -> None:
    refused(folder, "up_proj", "48 x 32", "64 x 32", model=llama(intermediate_size=64))


def test_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refused(folder, "adapter_model.bin", "not a complete file of torch.save")


def test_resized_vocabulary(tmp_path: Path) -> None:
    """PEFT saves the whole resized embedding with the adapter, and overwrites the base's with it on loading."""
    folder = tmp_path / "adapter"
    grown = peft.get_peft_model(llama(vocab_size=100), peft.LoraConfig(target_modules=["q_proj"]))
    grown.save_pretrained(str(folder), save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in load_file(folder / WEIGHTS)
    refused(folder, "a copy of ", ".weight [100, 32]", "[97, 32]", "vocabulary")
    reparam.load(llama(vocab_size=100), folder)


def test_other_embedding(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    other = llama()
    other.model.embed_tokens.weight.data[5] += 1
    peft.get_peft_model(other, peft.LoraConfig(target_modules=["embed_tokens"])).save_pretrained(str(folder))
    refused(folder, "embed_tokens.weight", "differs from the base's")
    reparam.load(llama(), folder, check_base=False)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_damage_is_an_error_or_harmless(folder: Path, data: st.DataObject) -> None:
    """Any damage gives a FormatError and an unchanged model, or an adapter with finite outputs."""
    name = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    content = bytearray((folder / name).read_bytes())
    limit = len(content) if name == CONFIG else 2000  # of the weights, the header: a change of a number is a number
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
    damaged = folder.with_name("damaged")
    damaged.mkdir(exist_ok=True)
    for file in (CONFIG, WEIGHTS):
        (damaged / file).write_bytes(content if file == name else (folder / file).read_bytes())
    model = llama()
    before = frozen(model)
    try:
        reparam.load(model, damaged)
    except reparam.FormatError:
        assert not hasattr(model, "reparam_state")
    else:
        assert torch.isfinite(logits(model)).all()
        reparam.remove(model, "default")
    assert same(frozen(model), before)
