"""PEFT folders of vision-language models: settings that name more or fewer modules than the file, and old names."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from adapters import assert_equal_but_for_rounding
from models import build, llama
from safetensors.torch import load_file, save_file
from torch import Tensor

import reparam
from reparam.io.peft_config import _defaults_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def llava() -> Any:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**TEXT), image_token_index=90
    )
    return build(hf.LlavaForConditionalGeneration, config)


def qwen() -> Any:
    vision = {"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 4}
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    config = hf.Qwen2VLConfig(vision_config=vision, text_config=text, image_token_id=90, video_token_id=91)
    return build(hf.Qwen2VLForConditionalGeneration, config)


def paligemma() -> Any:
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, projection_dim=32),
        text_config=hf.GemmaConfig(**TEXT, head_dim=8),
        projection_dim=32,
        image_token_index=90,
    )
    return build(hf.PaliGemmaForConditionalGeneration, config)


def idefics() -> Any:
    config = hf.Idefics3Config(
        vision_config=VISION, text_config=hf.LlamaConfig(**TEXT), image_token_id=90, scale_factor=2
    )
    return build(hf.Idefics3ForConditionalGeneration, config)


MODELS = {"llava": llava, "qwen2-vl": qwen, "paligemma": paligemma, "idefics3": idefics}
every = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
IDS = torch.randint(3, 89, (2, 6), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def randomized(model: Any) -> Any:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def saved(make: Callable[[], Any], folder: Path, **config: Any) -> Tensor:
    model = randomized(peft.get_peft_model(make(), peft.LoraConfig(r=2, **config)))
    model.save_pretrained(str(folder))
    return logits(model)


def edit(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**settings, **changes}))


def rename(folder: Path, change: Callable[[str], str | None]) -> None:
    found = {new: tensor for key, tensor in load_file(folder / WEIGHTS).items() if (new := change(key)) is not None}
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})


def loaded(make: Callable[[], Any], folder: Path) -> tuple[Tensor, list[str]]:
    """The logits with reparam, and its warnings; checked against PEFT, which loads the same folder."""
    model = make()
    before = logits(model)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        reparam.load(model, folder)
    ours = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = logits(peft.PeftModel.from_pretrained(make(), str(folder)).eval())
    assert_equal_but_for_rounding(ours, theirs)
    assert (ours - before).abs().max() > 1e-3
    return ours, [str(one.message) for one in found if str(folder) in str(one.message)]


@every
def test_the_language_part_alone(make: Callable[[], Any], tmp_path: Path) -> None:
    expected = saved(make, tmp_path, target_modules=["q_proj", "v_proj"], exclude_modules=r".*vision.*|.*visual.*")
    whole = [n for n, m in make().named_modules() if isinstance(m, torch.nn.Linear) and "vis" in n]
    names = ["q_proj", "v_proj", *({"qkv"} if make is qwen else ())]
    edit(tmp_path, target_modules=names, exclude_modules=None)
    found, (message,) = loaded(make, tmp_path)
    assert_equal_but_for_rounding(found, expected)
    assert "stay unchanged" in message
    assert any(name in message for name in whole)


@every
def test_settings_of_the_language_part_with_tensors_of_all(make: Callable[[], Any], tmp_path: Path) -> None:
    saved(make, tmp_path, target_modules=r".*(q_proj|v_proj|qkv)")
    edit(tmp_path, target_modules=r".*(language_model|text_model).*(q_proj|v_proj)")
    _, (message,) = loaded(make, tmp_path)
    assert "left out the factors" in message


def test_a_missing_layer_is_still_refused(tmp_path: Path) -> None:
    saved(llava, tmp_path, target_modules=r".*language_model.*(q_proj|v_proj)")
    rename(tmp_path, lambda key: None if "layers.1" in key else key)
    with pytest.raises(reparam.FormatError, match=r"settings name modules without tensors: .*layers\.1"):
        reparam.load(llava(), tmp_path)


OLD = {  # the names of transformers 4.51 and before
    "llava": ("base_model.model.model.language_model.", "base_model.model.language_model.model."),
    "paligemma": ("base_model.model.model.language_model.", "base_model.model.language_model.model."),
    "qwen2-vl": ("base_model.model.model.language_model.", "base_model.model.model."),
}


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 3}},
    ],
    ids=str,
)
def test_names_of_earlier_releases(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    make, (new, old) = MODELS[name], OLD[name]
    expected = saved(make, tmp_path, exclude_modules=r".*vision.*|.*visual.*", **config)
    rename(tmp_path, lambda key: key.replace(new, old))
    assert all(key.startswith(old) and not key.startswith(new) for key in load_file(tmp_path / WEIGHTS))
    model = make()
    adapter = reparam.load(model, tmp_path)
    assert_equal_but_for_rounding(logits(model), expected)
    assert all(path.startswith("model.language_model.layers.") for path in adapter.sites)


def test_full_paths_in_the_settings_of_earlier_releases(tmp_path: Path) -> None:
    expected = saved(llava, tmp_path, target_modules=r".*language_model.*(q_proj|v_proj)")
    rename(tmp_path, lambda key: key.replace(*OLD["llava"]))
    edit(tmp_path, target_modules=r"language_model\.model\.layers\.\d+\.self_attn\.(q|v)_proj")
    edit(tmp_path, rank_pattern={r"language_model.model.layers.0.self_attn.q_proj": 2}, r=2)
    model = llava()
    reparam.load(model, tmp_path)
    assert_equal_but_for_rounding(logits(model), expected)


def test_names_of_no_release_are_refused(tmp_path: Path) -> None:
    saved(llava, tmp_path, target_modules=r".*language_model.*q_proj")
    rename(tmp_path, lambda key: key.replace("model.language_model.", "model.decoder."))
    with pytest.raises(reparam.FormatError, match=r"lacks 2 modules of the adapter \(first: model\.decoder\."):
        reparam.load(llava(), tmp_path)


def test_excluded_modules_of_a_plain_model(tmp_path: Path) -> None:
    saved(llama, tmp_path, target_modules=["q_proj", "v_proj"])
    edit(tmp_path, target_modules=["q_proj"])
    _, (message,) = loaded(llama, tmp_path)
    assert "left out the factors of model.layers." in message
    assert "self_attn.v_proj" in message


@dataclasses.dataclass
class Later(peft.LoraConfig):  # type: ignore[misc]
    """The settings of a later PEFT."""

    gamma_init: float = 0.5
    route_order: list[str] = dataclasses.field(default_factory=lambda: ["a", "b"])
    plan: dict[str, int] = dataclasses.field(default_factory=lambda: {"depth": 2})


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        ({"gamma_init": 0.5, "route_order": ["a", "b"], "plan": {"depth": 2}}, None),
        ({"gamma_init": 0.4}, "gamma_init = 0.4"),
        ({"plan": {"depth": 3}}, "plan = "),
        ({"gamma_init": True}, "gamma_init = True"),
        ({"other": 1}, "other = 1"),
        ({"gamma_init": 0, "other": [None, {}]}, None),
    ],
    ids=str,
)
def test_settings_of_a_later_peft(
    more: dict[str, Any], refused: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A setting at its default changes nothing; another value of a setting that we do not know can."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(str(tmp_path))
    settings = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**settings, "peft_version": "0.99.0", **more}))
    monkeypatch.setitem(peft.PEFT_TYPE_TO_CONFIG_MAPPING, "LORA", Later)
    _defaults_of.cache_clear()
    found = llama()
    try:
        if refused is None:
            reparam.load(found, tmp_path)
            with torch.no_grad():
                ids = torch.arange(8).view(2, 4)
                assert_equal_but_for_rounding(found(ids).logits, model(ids).logits)
        else:
            with pytest.raises(reparam.FormatError, match=rf"{refused}.*unknown key .peft_version '0.99.0'.; install"):
                reparam.load(found, tmp_path)
    finally:
        _defaults_of.cache_clear()
