"""Loading PEFT's adapters: the same logits as in PEFT, and the same tensors after saving again."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from adapters import assert_equal_but_for_rounding
from models import IDS, bert, build, gpt2, llama, logits, mixtral, qwen_moe, t5, tied_llama
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel

import reparam
from reparam.io.peft import CONFIG, WEIGHTS

CONVS = ["c_attn", "c_proj", "c_fc"]
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


def scored_llama() -> Any:
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return build(LlamaForSequenceClassification, config)


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (llama, {"target_modules": PROJECTIONS}),
    "defaults of PEFT": (llama, {}),
    "all-linear": (llama, {"target_modules": "all-linear", "r": 2}),
    "regular expression": (llama, {"target_modules": r".*\.1\..*(q|gate)_proj"}),
    "rslora": (llama, {"target_modules": PROJECTIONS, "r": 3, "lora_alpha": 5, "use_rslora": True}),
    "dropout": (llama, {"target_modules": PROJECTIONS, "lora_dropout": 0.3}),
    "patterns": (
        llama,
        {
            "target_modules": "all-linear",
            "rank_pattern": {r"^model.layers.0.self_attn.k_proj": 5, r"layers\.1\..*down_proj": 1, "q_proj": 2},
            "alpha_pattern": {"o_proj": 3, r"^model\.layers\.1\.mlp\.(up|gate)_proj": 0.5, "not_there": 9},
        },
    ),
    "rslora with patterns": (
        llama,
        {
            "target_modules": PROJECTIONS,
            "use_rslora": True,
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"q_proj": 1},
        },
    ),
    "one layer": (llama, {"target_modules": PROJECTIONS, "layers_to_transform": 1}),
    "layers by pattern": (
        llama,
        {"target_modules": PROJECTIONS, "layers_to_transform": [0], "layers_pattern": "layers"},
    ),
    "excluded": (llama, {"target_modules": "all-linear", "exclude_modules": ["k_proj", "model.layers.0.mlp.up_proj"]}),
    "excluded by expression": (llama, {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}),
    "gaussian": (llama, {"target_modules": PROJECTIONS, "init_lora_weights": "gaussian"}),
    "orthogonal": (llama, {"target_modules": PROJECTIONS, "init_lora_weights": "orthogonal"}),
    "mica": (llama, {"target_modules": PROJECTIONS, "init_lora_weights": "mica"}),
    "random": (llama, {"target_modules": PROJECTIONS, "init_lora_weights": False}),
    "dora": (llama, {"target_modules": "all-linear", "use_dora": True, "r": 3, "lora_alpha": 5}),
    "dora with rslora and patterns": (
        llama,
        {
            "target_modules": PROJECTIONS,
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"q_proj": 1},
        },
    ),
    "dora on an encoder": (bert, {"target_modules": ["query", "dense"], "use_dora": True, "bias": "lora_only"}),
    "dora on conv1d": (gpt2, {"target_modules": CONVS, "fan_in_fan_out": True, "use_dora": True}),
    "conv1d": (gpt2, {"target_modules": CONVS, "fan_in_fan_out": True}),
    "conv1d with biases": (gpt2, {"target_modules": CONVS, "fan_in_fan_out": True, "bias": "lora_only"}),
    "biases of B": (gpt2, {"target_modules": CONVS, "fan_in_fan_out": True, "lora_bias": True, "use_rslora": True}),
    "biases of B, without others": (llama, {"target_modules": PROJECTIONS, "lora_bias": True}),
    "biases of B and others": (bert, {"target_modules": ["query", "dense"], "lora_bias": True, "bias": "lora_only"}),
    "all biases": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "all biases and a head": (bert, {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "all biases with dora": (bert, {"target_modules": ["query"], "bias": "all", "use_dora": True}),
    "all biases without any": (llama, {"target_modules": PROJECTIONS, "bias": "all"}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding alone": (gpt2, {"target_modules": ["wte"]}),
    "tied embedding": (tied_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied base": (tied_llama, {"target_modules": PROJECTIONS}),
    "head": (llama, {"target_modules": ["lm_head", "q_proj"]}),
    "whole head": (llama, {"target_modules": PROJECTIONS, "modules_to_save": ["lm_head"]}),
    "whole head, tied base": (tied_llama, {"target_modules": PROJECTIONS, "modules_to_save": ["lm_head"]}),
    "whole norms": (llama, {"target_modules": PROJECTIONS, "modules_to_save": ["norm"]}),
    "classification": (scored_llama, {"target_modules": PROJECTIONS, "task_type": "SEQ_CLS"}),
    "encoder": (bert, {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "bias": "lora_only"}),
    "encoder and decoder": (t5, {"target_modules": ["q", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
    "mixture of experts": (mixtral, {"target_modules": ["q_proj", "o_proj"]}),
    "shared expert": (qwen_moe, {"target_modules": ["shared_expert.up_proj", "q_proj"]}),
}


class Saved(NamedTuple):
    folder: Path
    make: Callable[[], Any]
    logits: Tensor


def randomize(model: Any) -> Any:
    """Randomize all trained parameters, so that no factor is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def save(make: Callable[[], Any], folder: Path, **config: Any) -> Saved:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = randomize(peft.get_peft_model(make(), peft.LoraConfig(**config)))
        model.save_pretrained(str(folder))
    return Saved(folder, make, logits(model).detach())


@pytest.fixture(scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    make, config = CASES[request.param]
    return save(make, tmp_path_factory.mktemp("peft"), **config)


def base_for(saved: Saved) -> Any:
    """The base, untied if the adapter changes only one of two tied weights, as PEFT does silently."""
    model = saved.make()
    if model.config.tie_word_embeddings and any(
        "lm_head" in k or "embed" in k for k in load_file(saved.folder / WEIGHTS)
    ):
        reparam.untie(model)
    return model


def edit(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    return folder


each = pytest.mark.parametrize("saved", CASES, indirect=True)


@each
def test_gives_pefts_logits(saved: Saved) -> None:
    model = base_for(saved)
    before = logits(model)
    reparam.load(model, saved.folder)
    assert_equal_but_for_rounding(logits(model), saved.logits)
    assert (before - saved.logits).abs().max() > 0.1
    reparam.select(model, None)
    assert torch.equal(logits(model), before)


@each
def test_comes_back_to_peft_unchanged(saved: Saved, tmp_path: Path) -> None:
    adapter = reparam.load(base_for(saved), saved.folder)
    adapter.save(tmp_path / "ours", format="peft")
    before, after = load_file(saved.folder / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
    carried = {
        key
        for key in before
        if key.endswith(("base_layer.weight", ".modules_to_save.bias")) or ".original_module." in key
    }
    assert after.keys() == before.keys() - carried
    assert all(torch.equal(after[key], before[key]) for key in after)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        warnings.filterwarnings("ignore", message=".*merging LoRA weights won't be possible")  # by PEFT
        model = peft.PeftModel.from_pretrained(saved.make(), str(tmp_path / "ours"))
    assert torch.equal(logits(model.eval()), saved.logits)


def test_named_adapters_are_in_subfolders(tmp_path: Path) -> None:
    model = randomize(peft.get_peft_model(llama(), peft.LoraConfig(target_modules=PROJECTIONS), adapter_name="first"))
    model.add_adapter("second", peft.LoraConfig(target_modules=["o_proj"], r=2))
    model.set_adapter("second")
    randomize(model)
    model.save_pretrained(str(tmp_path))
    found = llama()
    with pytest.raises(reparam.FormatError, match="subfolders: first, second"):
        reparam.load(found, tmp_path)
    for name in ("first", "second"):
        model.set_adapter(name)
        reparam.load(found, tmp_path / name, name=name)
        assert_equal_but_for_rounding(logits(found), logits(model))


def test_reads_what_transformers_saves_by_itself(tmp_path: Path) -> None:
    model = llama()
    model.add_adapter(peft.LoraConfig(target_modules=PROJECTIONS))
    randomize(model).save_pretrained(str(tmp_path))
    found = llama()
    reparam.load(found, tmp_path)
    assert_equal_but_for_rounding(logits(found), logits(model))


def test_reads_a_converted_pissa_adapter(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=PROJECTIONS, init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide says, so that the initial state can be kept
    model.save_pretrained(str(tmp_path / "initial"))
    model.peft_config["default"].init_lora_weights = "pissa"
    randomize(model).save_pretrained(str(tmp_path / "moved"))
    expected = logits(model)
    with pytest.raises(reparam.FormatError, match=r"init_lora_weights = 'pissa': .*path_initial_model"):
        reparam.load(llama(), tmp_path / "moved")
    model.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    found = llama()
    reparam.load(found, tmp_path / "plain")
    torch.testing.assert_close(logits(found), expected, rtol=1e-3, atol=1e-4)


def test_16_bit_tensors_are_exact(tmp_path: Path) -> None:
    saved = save(llama, tmp_path, target_modules=PROJECTIONS)
    rounded = {key: tensor.bfloat16() for key, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(rounded, tmp_path / WEIGHTS, metadata={"format": "pt"})
    expected = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    model = llama()
    adapter = reparam.load(model, saved.folder)
    assert_equal_but_for_rounding(logits(model), logits(expected))
    assert all(torch.equal(t.bfloat16().float(), t) for t in adapter.tensors().values())


def test_16_bit_base(tmp_path: Path) -> None:
    def make() -> Any:
        return llama().bfloat16()

    saved = save(make, tmp_path, target_modules=["embed_tokens", *PROJECTIONS], modules_to_save=["lm_head"])
    model = make()
    before = logits(model).float()
    reparam.load(model, tmp_path)
    off, moved = (logits(model).float() - saved.logits.float()).norm(), (before - saved.logits.float()).norm()
    assert off < 0.02 * moved


def test_the_base_may_have_another_dtype(tmp_path: Path) -> None:
    saved = save(lambda: llama().bfloat16(), tmp_path, target_modules=["embed_tokens", "q_proj"])
    assert any(key.endswith("embed_tokens.base_layer.weight") for key in load_file(saved.folder / WEIGHTS))
    reparam.load(llama(), tmp_path)  # the same numbers before rounding


def test_states_which_base_it_is_for(tmp_path: Path) -> None:
    model = llama()
    model.name_or_path = "someone/base"
    save(lambda: model, tmp_path, target_modules=PROJECTIONS)
    base = reparam.io.files.read(tmp_path).base
    assert base is not None
    assert base.source == "someone/base"


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", "CAUSAL_LM", None])
def test_models_wrapped_for_a_task(task: str | None, tmp_path: Path) -> None:
    """Keys are the base's paths, without the name of PEFT's wrapper class."""

    def make() -> Any:
        return llama() if task == "CAUSAL_LM" else build(LlamaModel, llama().config)

    model = randomize(peft.get_peft_model(make(), peft.LoraConfig(target_modules=PROJECTIONS, task_type=task)))
    model.save_pretrained(str(tmp_path))
    found = make()
    reparam.load(found, tmp_path)
    assert_equal_but_for_rounding(found(IDS)[0], model(IDS)[0])


@pytest.mark.parametrize("init", ["eva", "Gaussian", False, None])
def test_initializations_that_leave_the_base_alone(init: object, tmp_path: Path) -> None:
    saved = save(llama, tmp_path, target_modules=PROJECTIONS)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "init_lora_weights": init}))
    model = llama()
    reparam.load(model, tmp_path)
    assert_equal_but_for_rounding(logits(model), saved.logits)
