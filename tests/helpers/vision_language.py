"""Tiny vision-language models of transformers with random weights, and their processors, saved as folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as hf
from models import ASSETS, build
from transformers import AutoTokenizer

TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1, "pad_token_id": 1,
    "bos_token_id": None, "eos_token_id": 5, "tie_word_embeddings": False,
}  # fmt: skip
VISION = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
# Each template writes the parts of a content in their order, and the model's own text for an image.
TEMPLATE = (
    "{{% for m in messages %}}<|{{{{ m['role'] }}}}|>"
    "{{% if m['content'] is string %}}{{{{ m['content'] }}}}{{% else %}}"
    "{{% for part in m['content'] %}}{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}"
    "{{% endif %}}{{% endfor %}}{{% endif %}}<|end|>{{% endfor %}}{{% if add_generation_prompt %}}<|assistant|>"
    "{{% endif %}}"
)


def tokenizer(image: str, *tokens: str, **named: str) -> Any:
    """The tokenizer of assets/tiny-python with the tokens of a model, and a template that writes `image` for one."""
    found = AutoTokenizer.from_pretrained(ASSETS / "tiny-python", extra_special_tokens=named)
    found.add_special_tokens({"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    found.chat_template = TEMPLATE.format(image=image)
    return found


def ids(found: Any, *tokens: str) -> list[int]:
    return [int(found.convert_tokens_to_ids(token)) for token in tokens]


def llava(folder: Path) -> None:
    words = tokenizer("<image>", "<image>")
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(vocab_size=len(words), **TEXT),
        image_token_index=ids(words, "<image>")[0],
        image_seq_length=4,
    )
    build(hf.LlavaForConditionalGeneration, config).save_pretrained(folder)
    pixels = hf.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    made = hf.LlavaProcessor(
        pixels, words, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    written(made, words, folder)


def llava_next(folder: Path) -> None:
    words = tokenizer("<image>", "<image>")
    pinpoints = [[8, 16], [16, 8], [16, 16]]
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(vocab_size=len(words), **TEXT),
        image_token_index=ids(words, "<image>")[0],
        image_grid_pinpoints=pinpoints,
    )
    build(hf.LlavaNextForConditionalGeneration, config).save_pretrained(folder)
    pixels = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_grid_pinpoints=pinpoints
    )
    made = hf.LlavaNextProcessor(
        pixels, words, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    written(made, words, folder)


def qwen(folder: Path, kind: str) -> None:
    start, image, end, _ = QWEN_TOKENS
    words = tokenizer(start + image + end, *QWEN_TOKENS)
    common = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision = {
        "Qwen2VL": {**common, "embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2},
        "Qwen2_5_VL": {
            **common, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24, "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        "Qwen3VL": {
            **common, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    }[kind]  # fmt: skip
    text = {**TEXT, "vocab_size": len(words), "rope_parameters": ROPE} | ({"head_dim": 8} if kind == "Qwen3VL" else {})
    numbers = dict(
        zip(
            ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id"),
            ids(words, *QWEN_TOKENS),
            strict=True,
        )
    )
    config = getattr(hf, f"{kind}Config")(vision_config=vision, text_config=text, tie_word_embeddings=False, **numbers)
    build(getattr(hf, f"{kind}ForConditionalGeneration"), config).save_pretrained(folder)
    pixels = hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    pixels.save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": f"{kind}Processor" if kind != "Qwen2_5_VL" else "Qwen2_5_VLProcessor"})
    )


def gemma3(folder: Path) -> None:
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    words = tokenizer("<start_of_image>", **named)
    soft, begin, end = ids(words, *named.values())
    text = {**TEXT, "head_dim": 8, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**{**VISION, "image_size": 16}),
        text_config=hf.Gemma3TextConfig(vocab_size=len(words), **text),
        mm_tokens_per_image=4,
        image_token_index=soft,
        boi_token_index=begin,
        eoi_token_index=end,
        tie_word_embeddings=False,
    )
    build(hf.Gemma3ForConditionalGeneration, config).save_pretrained(folder)
    pixels = hf.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    written(hf.Gemma3Processor(pixels, words, image_seq_length=4), words, folder)


def idefics3(folder: Path) -> None:
    tokens = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    tokens += tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
    words = tokenizer("<image>", *tokens)
    config = hf.Idefics3Config(
        vision_config={**VISION, "image_size": 16},
        text_config=hf.LlamaConfig(vocab_size=len(words), **TEXT),
        image_token_id=ids(words, "<image>")[0],
        scale_factor=2,
        tie_word_embeddings=False,
    )
    build(hf.Idefics3ForConditionalGeneration, config).save_pretrained(folder)
    pixels = hf.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    written(hf.Idefics3Processor(pixels, words, image_seq_len=4), words, folder)


def smolvlm(folder: Path) -> None:
    tokens = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    tokens += tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
    words = tokenizer("<image>", *tokens)
    config = hf.SmolVLMConfig(
        vision_config={**VISION, "image_size": 16},
        text_config=hf.LlamaConfig(vocab_size=len(words), **TEXT),
        image_token_id=ids(words, "<image>")[0],
        scale_factor=2,
        tie_word_embeddings=False,
    )
    build(hf.SmolVLMForConditionalGeneration, config).save_pretrained(folder)
    pixels = hf.SmolVLMImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    pixels.save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "SmolVLMProcessor", "image_seq_len": 4})
    )


def written(made: Any, words: Any, folder: Path) -> None:
    made.chat_template = words.chat_template
    made.save_pretrained(folder)


BASES: dict[str, Callable[[Path], None]] = {
    "llava": llava,
    "llava-next": llava_next,
    "qwen2-vl": lambda folder: qwen(folder, "Qwen2VL"),
    "qwen2.5-vl": lambda folder: qwen(folder, "Qwen2_5_VL"),
    "qwen3-vl": lambda folder: qwen(folder, "Qwen3VL"),
    "gemma3": gemma3,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
}
