"""Answers of a model that sees, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from reparam.data.batches import padding_id
from reparam.evaluation.complete import PLAIN
from reparam.hf.stops import stop_tokens, until_stop


def generated(vora: Any, text: Any, images: Any, *, raw: bool | None = None, **settings: Any) -> Any:
    """What `VoRA.generate` returns: a text for one prompt, and a list of texts for several."""
    one = isinstance(text, str) or (len(text) > 0 and isinstance(text[0], Mapping))
    _, out = answer_ids(vora, text, images, raw=raw, **settings)
    stops = stop_tokens(vora.language, vora.processor.marked)
    answers = [until_stop(row, stops) for row in out.tolist()]
    found = vora.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
    return found[0] if one and len(found) == 1 else found


def answer_ids(vora: Any, text: Any, images: Any, *, raw: bool | None = None, **settings: Any) -> tuple[Any, Tensor]:
    """The inputs that the processor makes, on the model's device, and the ids that follow them, [B, new].

    The ids of an answer include the token that ended it. Raises ValueError as `VoRA.generate` does.
    """
    processor = vora.processor
    if processor is None:
        raise ValueError("there is no processor: set vora.processor = Processor(tokenizer, vora.vision), or use load()")
    inputs = processor(text, images, raw=raw)
    given = {key: value.to(vora.device) for key, value in inputs.items() if key != "pixel_values"}
    training = vora.training
    vora.eval()
    settings = {
        **PLAIN,
        "do_sample": False,
        "pad_token_id": padding_id(processor.tokenizer),
        "eos_token_id": stop_tokens(vora.language, processor.marked) or None,
        **settings,
    }
    out = vora.generate_ids(pixel_values=inputs["pixel_values"], **given, **settings)
    vora.train(training)
    return {**inputs, **given}, out[:, inputs["input_ids"].shape[1] :]
