"""Answers of a model that sees, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reparam.data.batches import padding_id
from reparam.evaluation.complete import PLAIN
from reparam.hf.stops import stop_tokens, until_stop


def generated(vora: Any, text: Any, images: Any, *, raw: bool | None = None, **settings: Any) -> Any:
    """What `VoRA.generate` returns: a text for one prompt, and a list of texts for several."""
    processor = vora.processor
    if processor is None:
        raise ValueError("there is no processor: set vora.processor = Processor(tokenizer, vora.vision), or use load()")
    one = isinstance(text, str) or (len(text) > 0 and isinstance(text[0], Mapping))
    inputs = processor(text, images, raw=raw)
    tokenizer, device = processor.tokenizer, vora.device
    stops = stop_tokens(vora.language, processor.marked)
    width = inputs["input_ids"].shape[1]
    given: dict[str, Any] = {key: value.to(device) for key, value in inputs.items() if key != "pixel_values"}
    training = vora.training
    vora.eval()
    settings = {
        **PLAIN,
        "do_sample": False,
        "pad_token_id": padding_id(tokenizer),
        "eos_token_id": stops or None,
        **settings,
    }
    out = vora.generate_ids(pixel_values=inputs["pixel_values"], **given, **settings)
    vora.train(training)
    answers = [until_stop(row, stops) for row in out[:, width:].tolist()]
    found = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return found[0] if one and len(found) == 1 else found
