"""Quantizing while transformers loads a model: same as afterwards, files both ways, and its Trainer."""

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import IDS, logits
from safetensors.torch import load_file, save_file
from sampled import pairs
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM, Trainer, TrainingArguments

import reparam
from reparam.errors import BaseError
from reparam.hf.config import StorageConfig
from reparam.hf.models import load_base, save_model
from reparam.io.mapped import Mapped
from reparam.weights.nf4 import NF4Weight

FAMILIES = {name: models.ALL[name] for name in ("llama", "tied_llama", "gpt2", "mixtral", "qwen_moe", "t5")}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STORAGES = [reparam.NF4(), reparam.NF4(32, double=False), reparam.Int8()]
CONFIGS: dict[str, Callable[[], StorageConfig]] = {
    "nf4": reparam.NF4Config,
    "nf4 plain": lambda: reparam.NF4Config(32, double=False),
    "int8": reparam.Int8Config,
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="targets: skipped")
        yield


def auto(family: str) -> Any:
    return AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether all parameters agree in names, dtypes and bits."""
    a, b = dict(one.named_parameters()), dict(other.named_parameters())
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family as a folder of several shards."""
    place = tmp_path_factory.mktemp("models")
    for name, make in FAMILIES.items():
        make().save_pretrained(place / name, max_shard_size="20kB")
        assert len(list((place / name).glob("*.safetensors"))) > 1
    return {name: place / name for name in FAMILIES}


@pytest.mark.parametrize(("family", "how", "dtype"), pairs(FAMILIES, CONFIGS, DTYPES))
def test_quantizing_on_load_is_packing_after_it(
    family: str, how: str, dtype: torch.dtype, folders: dict[str, Path], tmp_path: Path
) -> None:
    config, kind = CONFIGS[how](), auto(family)
    after = kind.from_pretrained(folders[family], dtype=dtype)
    report = reparam.quantize(after, config.storage)
    model = kind.from_pretrained(folders[family], dtype=dtype, quantization_config=config)
    assert same(model, after)
    assert torch.equal(logits(model), logits(after))
    found = model.hf_quantizer.report
    assert {(s.name, s.entries, s.bytes) for s in found.sites} == {(s.name, s.entries, s.bytes) for s in report.sites}
    assert found.left.items() <= report.left.items()  # a tied tensor once
    assert found.storage == report.storage

    model.save_pretrained(tmp_path / "quantized", max_shard_size="20kB")
    again = kind.from_pretrained(tmp_path / "quantized", dtype=dtype)
    assert same(again, model)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    one, other = tensors(tmp_path / "quantized"), tensors(tmp_path / "again")
    assert models.same(one, other)
    assert (tmp_path / "quantized/config.json").read_text() == (tmp_path / "again/config.json").read_text()


def test_config_json_says_how_to_load(folders: dict[str, Path], tmp_path: Path) -> None:
    config = reparam.NF4Config(128, double=False, targets="attention")
    model = AutoModelForCausalLM.from_pretrained(folders["llama"], quantization_config=config)
    model.save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    names = [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qkvo"]
    assert entry.pop("targets") == names
    assert entry == {"quant_method": "reparam", "storage": "nf4", "block": 128, "double": False}
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(again, model)
    keys = {key for key in tensors(tmp_path) if ".layers.0.self_attn.q_proj." in key}
    rest = ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4")
    assert keys == {f"model.layers.0.self_attn.q_proj.{key}" for key in rest}


def test_importing_the_package_imports_no_transformers_until_the_config_is_asked_for(
    folders: dict[str, Path],
) -> None:
    code = (
        "import sys, reparam; assert 'transformers' not in sys.modules; reparam.NF4Config;"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; assert 'reparam' in known;"
        "config = reparam.Int8Config();"
        "from transformers import AutoModelForCausalLM as A;"
        f"m = A.from_pretrained({str(folders['llama'])!r}, quantization_config=config);"
        "assert len(m.hf_quantizer.report.sites) == 14"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    with pytest.raises(AttributeError, match="NF5Config"):
        reparam.NF5Config  # noqa: B018


def test_experts_are_quantized_without_a_warning(folders: dict[str, Path]) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = load_base(str(folders["mixtral"]), storage=reparam.NF4())
    assert not any("experts" in str(warning.message) for warning in said)
    assert not [name for name in model.hf_quantizer.report.left if "experts" in name]


def test_the_report_is_logged(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "reparam"):
        load_base(str(folders["llama"]), storage=reparam.NF4())
    assert "quantized 14 matrices into nf4" in caplog.text


@pytest.mark.parametrize("how", CONFIGS)
def test_embeddings_and_head_when_asked(how: str, folders: dict[str, Path], tmp_path: Path) -> None:
    names = ("all-linear", "lm_head", "embed_tokens")
    storage = CONFIGS[how]().storage
    model = load_base(str(folders["llama"]), storage=storage, targets=names)
    after = load_base(str(folders["llama"]))
    reparam.quantize(after, storage, targets=names)
    assert same(model, after)
    assert model.hf_quantizer.report.left == {}
    save_model(model, None, tmp_path / "a")
    assert same(load_base(str(tmp_path / "a")), model)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_model_quantized_by_hand_is_saved_the_same(
    storage: reparam.NF4 | reparam.Int8, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load_base(str(folders["gpt2"]))
    reparam.quantize(model, storage)
    save_model(model, None, tmp_path / "a")
    save_model(load_base(str(folders["gpt2"]), storage=storage), None, tmp_path / "b")
    assert models.same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()
    assert same(load_base(str(tmp_path / "a")), model)


def test_unpacked_again_it_is_an_ordinary_model(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_base(str(folders["llama"]), storage=reparam.NF4())
    expected = logits(model)
    model.dequantize()
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    model.save_pretrained(tmp_path / "a")
    other = load_base(str(folders["llama"]), storage=reparam.NF4())
    reparam.quantize(other, "dense")
    other.save_pretrained(tmp_path / "b")
    for name in ("a", "b"):
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text())
    assert models.same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))


def test_the_module_that_was_there_gets_its_bias_back(folders: dict[str, Path]) -> None:
    model = load_base(str(folders["gpt2"]), storage=reparam.Int8())
    reparam.quantize(model, "dense")
    assert not any(p.is_meta for p in model.parameters())
    biases = {k: v for k, v in tensors(folders["gpt2"]).items() if k.endswith("bias")}
    assert all(torch.equal(model.get_parameter(k), v) for k, v in biases.items())


def test_a_model_trains_under_trainer_and_its_adapter_is_saved(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_base(str(folders["llama"]), storage=reparam.NF4())
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapter = reparam.attach(model, reparam.LoRA(r=4, alpha=8), name="task")
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=3, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    first = models.loss(model).item()
    trainer.train()
    model.eval()
    assert models.loss(model).item() < first
    after = dict(model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    adapter.save(tmp_path / "task")
    expected = logits(model)
    other = load_base(str(folders["llama"]), storage=reparam.NF4())
    reparam.load(other, tmp_path / "task")
    assert torch.equal(logits(other), expected)


def test_a_plain_model_is_saved_without_adapters_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_base(str(folders["llama"]), storage=reparam.NF4())
    reparam.attach(model, reparam.LoRA(r=4), name="task")
    with pytest.raises(ValueError, match=r"writes a model without adapters: save the adapter \(adapter.save\)"):
        save_model(model, None, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    reparam.remove(model, "task")
    save_model(model, None, tmp_path / "b")
    assert same(load_base(str(tmp_path / "b")), load_base(str(folders["llama"]), storage=reparam.NF4()))


def test_it_generates(folders: dict[str, Path]) -> None:
    model = load_base(str(folders["llama"]), storage=reparam.NF4(), dtype="bfloat16")
    found = model.generate(IDS[:1], max_new_tokens=5, do_sample=False)
    assert found.shape == (1, IDS.shape[1] + 5)


@pytest.mark.parametrize("place", ["cpu", {"": "cpu"}])
def test_a_device_map(place: Any, folders: dict[str, Path]) -> None:
    pytest.importorskip("accelerate")
    config = reparam.NF4Config()
    model = AutoModelForCausalLM.from_pretrained(folders["llama"], quantization_config=config, device_map=place)
    plain = AutoModelForCausalLM.from_pretrained(folders["llama"], quantization_config=config)
    assert same(model, plain)
    assert model.hf_quantizer.quantized_element_size == pytest.approx(4.129 / 8, abs=1e-3)


# ---- refused


@pytest.mark.parametrize("block", [63, 0, True])
def test_a_bad_block(block: int) -> None:
    with pytest.raises(ValueError, match="block"):
        reparam.NF4Config(block)


def test_what_cannot_be_asked_for(folders: dict[str, Path]) -> None:
    place = str(folders["llama"])
    with pytest.raises(BaseError, match=r"'q_porj' matches no module \(did you mean 'q_proj'"):
        load_base(place, storage=reparam.NF4(), targets="q_porj")
    with pytest.raises(ValueError, match="q_porj"):
        AutoModelForCausalLM.from_pretrained(place, quantization_config=reparam.NF4Config(targets="q_porj"))
    with pytest.raises(BaseError, match="lm_head: shares its weight"):
        load_base(str(folders["tied_llama"]), storage=reparam.NF4(), targets=("all-linear", "lm_head"))
    disk = {"model": "disk", "lm_head": "cpu"}
    with pytest.raises(ValueError, match="disk"):
        AutoModelForCausalLM.from_pretrained(place, quantization_config=reparam.NF4Config(), device_map=disk)
    with pytest.raises(ValueError, match="expected 'reparam' or 'bitsandbytes'"):
        save_model(load_base(place), None, "nowhere", format="gguf")


def test_several_storages_do_not_go_into_one_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_base(str(folders["llama"]))
    reparam.quantize(model, "int8", targets="attention")
    reparam.quantize(model, "nf4", targets="mlp")
    with pytest.raises(ValueError, match="int8 and nf4"):
        save_model(model, None, tmp_path / "a")


def test_a_quantized_folder_is_not_quantized_otherwise(folders: dict[str, Path], tmp_path: Path) -> None:
    place = tmp_path / "quantized"
    save_model(load_base(str(folders["llama"]), storage=reparam.NF4()), None, place)
    assert same(load_base(str(place), storage=reparam.NF4()), load_base(str(place)))
    for storage in (reparam.NF4(128), reparam.Int8()):
        with pytest.raises(BaseError, match=r"is quantized already, as NF4.*would lose precision twice") as error:
            load_base(str(place), storage=storage)
        assert "\n" not in str(error.value)
    with pytest.raises(BaseError, match="is quantized already, but not in lm_head"):
        load_base(str(place), storage=reparam.NF4(), targets=("all-linear", "lm_head"))
    with pytest.raises(ValueError, match=r"NF4Config.*Int8Config"):
        AutoModelForCausalLM.from_pretrained(place, quantization_config=reparam.Int8Config())
    with pytest.raises(ValueError, match="quantizing again adds error"):
        reparam.quantize(load_base(str(place)), "int8")


def test_all_matrices_with_nan_are_named_at_once(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_base(str(folders["gpt2"]))
    for layer in model.transformer.h:
        with torch.no_grad():
            layer.mlp.c_fc.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(BaseError) as error:
        load_base(str(tmp_path / "a"), storage=reparam.NF4())
    assert all(f"transformer.h.{i}.mlp.c_fc.weight: nf4: the matrix contains NaN" in str(error.value) for i in (0, 1))


def test_another_shape_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_base(str(folders["llama"]))
    model.save_pretrained(tmp_path / "dense")
    reparam.quantize(model, "int8")
    save_model(model, None, tmp_path / "quantized")
    for name, storage in (("dense", reparam.NF4()), ("quantized", None)):
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
        with pytest.raises(BaseError, match=r"down_proj.weight is \[32, 48\] in the files, but \[32, 40\] in"):
            load_base(str(tmp_path / name), storage=storage)


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{Q}.absmax"), f"{Q}.absmax is missing"),
        (lambda t: t.pop(f"{Q}.quant_state.bitsandbytes__nf4"), f"{Q}: quant_state.bitsandbytes__nf4 is missing"),
        (lambda t: t.update({f"{Q}.nested_absmax": torch.ones(5)}), "nested_absmax is float32 [5]"),
        (lambda t: t.update({Q: torch.zeros(32, 32)}), "weight is float32 [32, 32]"),
        (lambda t: [t.pop(key) for key in list(t) if key.startswith(Q)], f"{Q} is not quantized, but config.json"),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(97, 32, dtype=torch.uint8)}),
            "lm_head.weight: quant_state.bitsandbytes__nf4 is missing",
        ),
    ],
)
def test_a_damaged_quantized_folder(
    change: Callable[[dict[str, Tensor]], Any], said: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    save_model(load_base(str(folders["llama"]), storage=reparam.NF4()), None, tmp_path / "a")
    found = tensors(tmp_path / "a")
    change(found)
    save_file(found, tmp_path / "a/model.safetensors", {"format": "pt"})
    with pytest.raises(BaseError) as error:
        load_base(str(tmp_path / "a"))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"block": 63}, "block=63"),
        ({"block": "64"}, "block: expected a whole number"),
        ({"color": "red"}, "color"),
        ({"storage": "nf5"}, "did you mean 'nf4'"),
        ({"storage": None}, "expected the name of a storage"),
        ({"storage": "dense", "block": None, "double": None}, "unknown"),
        ({"targets": "all-linear"}, "a list of targets"),
        ({"targets": ["q_porj"]}, "q_porj"),
        (
            {"block": 128},
            "are quantized as NF4(block=64, double=True), but config.json says NF4(block=128, double=True)",
        ),
        ({"targets": ["lm_head"]}, "lm_head.weight is not quantized"),
    ],
)
def test_an_edited_configuration(change: dict[str, Any], said: str, folders: dict[str, Path], tmp_path: Path) -> None:
    save_model(load_base(str(folders["llama"]), storage=reparam.NF4()), None, tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    with pytest.raises(BaseError) as error:
        load_base(str(tmp_path / "a"))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bias_that_the_files_lack_is_zero(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_base(str(folders["gpt2"]))
    save_model(model, None, tmp_path / "a")
    found = tensors(tmp_path / "a")
    del found["transformer.h.0.mlp.c_fc.bias"]
    save_file(found, tmp_path / "a/model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", quantization_config=reparam.Int8Config())
    assert not model.transformer.h[0].mlp.c_fc.bias.any()
    with pytest.raises(BaseError, match=r"c_fc\.bias is missing"):
        load_base(str(tmp_path / "a"), storage=reparam.Int8())


# ---- memory


def test_forgetting_pages_changes_no_value(tmp_path: Path) -> None:
    value = torch.randn(300_000)
    save_file({"a": value}, tmp_path / "f.safetensors")
    mapped = Mapped([tmp_path / "f.safetensors"])
    found = load_file(tmp_path / "f.safetensors")["a"]
    assert torch.equal(found, value)
    mapped.forget()
    assert torch.equal(found, value)


def test_a_model_of_the_same_files_that_was_changed_stays_changed(folders: dict[str, Path]) -> None:
    """Its tensors may be memory-mapped from the file, and its changes must survive."""
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    expected = {name: p.clone() for name, p in model.named_parameters()}
    load_base(str(folders["llama"]), storage=reparam.NF4())
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


def test_tensors_that_the_caller_gives_are_quantized_and_kept(folders: dict[str, Path]) -> None:
    given = {key: value + 1 for key, value in tensors(folders["llama"]).items()}
    kept = {key: value.clone() for key, value in given.items()}
    shape, config = models.llama().config, reparam.NF4Config()
    model = LlamaForCausalLM.from_pretrained(None, config=shape, state_dict=given, quantization_config=config)
    name = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).frozen
    assert isinstance(weight, NF4Weight)
    assert torch.equal(weight.codes, reparam.NF4().quantize(kept[f"{name}.weight"]).codes)
    assert models.same(given, kept)
