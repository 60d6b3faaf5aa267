"""The attention of an answer to the patches of images, against the weights that transformers returns."""

from pathlib import Path

import pytest
import torch
from models import TOKENS, build, save_base
from seeing import MODELS, VISION, scrambled, seeing

from reparam import vision
from reparam.hf.models import load_tokenizer
from reparam.vision.attention import attention


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("base")
    save_base(folder)
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_are_those_of_transformers(name: str, tokenizer: object) -> None:
    """Two images of different sizes: each patch has the mean over heads, for the tokens that predict the answer."""
    kind, config, sizes = MODELS[name]
    size = len(tokenizer) + 1  # type: ignore[arg-type]
    settings = {**TOKENS, **sizes, "vocab_size": size, "attn_implementation": "eager"}
    vora = scrambled(seeing(build(kind, config(**settings))))
    vora.processor = vision.Processor(tokenizer, VISION)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(5)
    images = [torch.rand(3, 4, 6, generator=draw), torch.rand(3, 8, 4, generator=draw)]
    seen = attention(vora, "<image> a <image> b", images, raw=True, max_new_tokens=3)
    inputs = vora.processor("<image> a <image> b", images, raw=True)
    given = {key: inputs[key] for key in ("image_ids", "attention_mask", "pixel_values")}
    answer = vora.generate_ids(inputs["input_ids"], **given, max_new_tokens=3, do_sample=False)
    length = answer.shape[1]
    places = torch.nn.functional.pad(inputs["image_ids"], (0, length - inputs["image_ids"].shape[1]), value=-1)
    with torch.no_grad():
        told = vora(answer, pixel_values=inputs["pixel_values"], image_ids=places, output_attentions=True).attentions
    assert len(seen.tokens) == length - inputs["input_ids"].shape[1]
    first = inputs["input_ids"].shape[1] - 1
    for number, (found, shape) in enumerate(zip(seen.maps, ((2, 3), (4, 2)), strict=True)):
        assert found.shape[2:] == shape
        for block, weights in enumerate(told):
            expected = weights[0].mean(0)[first : length - 1][:, places[0] == number]
            assert torch.allclose(found[block].flatten(1), expected, atol=1e-6)
    assert float(seen.shares.min()) > 0
    assert float(seen.shares.max()) < 1
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(seen.pictures, images, strict=True))


def test_what_cannot_be_shown(tokenizer: object) -> None:
    vora = seeing()
    vora.processor = vision.Processor(tokenizer, VISION)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="load the model with attention='eager'"):
        attention(vora, "<image>", torch.rand(3, 4, 4), raw=True)
    vora.language.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="the prompt has no image"):
        attention(vora, "a", None, raw=True)


def test_the_picture(tmp_path: Path) -> None:
    """A picture in gray and without attention to most patches is drawn, too; dollar signs are no formulas."""
    from PIL import Image

    from reparam.inspect.looking import plot
    from reparam.vision.attention import Attention

    found = torch.zeros(1, 1, 2, 2)
    found[0, 0, 0, 1] = 0.4
    seen = Attention("$a$ cat", ("cat",), (torch.zeros(3, 4, 4),), (found,))
    plot(seen, tmp_path / "attention.png")
    assert Image.open(tmp_path / "attention.png").size[0] > 300
