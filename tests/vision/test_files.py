"""A model that sees is saved and loaded: adapter or merged model, processor, answers, and damaged folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_tokenizers import CHATML
from models import ASSETS, save_base
from seeing import METHOD, VISION, scrambled
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import reparam
from reparam import vision
from reparam.errors import DataError, FormatError
from reparam.hf.models import load_base, load_tokenizer
from reparam.images.places import placed_messages, with_places
from reparam.io.prompt_format import PromptFormat
from reparam.vision import Processor, VoRA
from reparam.vision.files import save


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    save_base(folder, initializer_range=0.2)
    return str(folder)


def made(base: str, *, storage: str | None = None, **told: Any) -> VoRA:
    model = load_base(base)
    if storage is not None:
        reparam.quantize(model, storage)
    vora = scrambled(VoRA(model, vision=VISION, blocks=1, method=METHOD).eval())
    vora.processor = Processor(load_tokenizer(base), VISION, PromptFormat("completion", **told))
    return vora


def scores(vora: VoRA) -> Tensor:
    assert vora.processor is not None
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = vora.processor("def f(<image>, x):", [image])
    with torch.no_grad():
        return vora(**inputs).logits


@pytest.mark.parametrize("storage", [None, "nf4"])
def test_an_adapter_and_a_merged_model_come_back(base: str, tmp_path: Path, storage: str | None) -> None:
    vora = made(base, storage=storage)
    before = scores(vora)
    save(vora, tmp_path / "adapter")
    assert torch.equal(scores(vision.load(tmp_path / "adapter")), before)
    assert "adapter.safetensors" in [file.name for file in (tmp_path / "adapter" / "adapter").iterdir()]
    if storage is not None:
        return
    vora.merge()
    after = scores(vora)
    save(vora, tmp_path / "merged")
    assert torch.equal(scores(vision.load(tmp_path / "merged")), after)
    assert torch.allclose(before, after, atol=1e-4)


def test_the_language_model_alone_is_a_plain_folder(base: str, tmp_path: Path) -> None:
    vora = made(base)
    vora.merge()
    save(vora, tmp_path / "merged")
    folder = tmp_path / "merged" / "language"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    ids = tokenizer("def f(x):", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, vora(ids).logits)
    assert len(tokenizer) == len(load_tokenizer(base))  # the place of an image is no token of it
    assert sum(p.numel() for p in stock.parameters()) == sum(p.numel() for p in load_base(base).parameters())


def test_teacher_and_heads_are_not_saved(base: str, tmp_path: Path) -> None:
    vora = made(base)
    save(vora, tmp_path / "a")
    names = [str(file.relative_to(tmp_path / "a")) for file in sorted((tmp_path / "a").rglob("*")) if file.is_file()]
    assert set(names) == {
        *("vora.json", "vision.safetensors", "prompt_format.json"),
        *("adapter/adapter.json", "adapter/adapter.safetensors"),
    }


def test_answers_in_words(base: str) -> None:
    """One prompt or several, with other images, equal those alone; a place in the middle; a text without an image."""
    vora = made(base)
    draw = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=draw) for size in ((8, 8), (4, 6))]
    prompts = ["def", "a <image> b <image> c", "class A:"]
    given: list[Any] = [images[0], images, None]
    together = vora.generate(prompts, given, max_new_tokens=6)
    alone = [vora.generate(text, its, max_new_tokens=6) for text, its in zip(prompts, given, strict=True)]
    assert together == alone
    assert vora.generate("def", images[1], max_new_tokens=6) != alone[0]


def test_chats_have_the_template_and_its_end(base: str) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = CHATML
    for rows, chat in (("chat", True), ("completion", False), (None, True)):
        told = PromptFormat(rows) if rows else None  # type: ignore[arg-type]
        processor = Processor(tokenizer, VISION, told)
        assert processor.chats == chat
    image = torch.rand(3, 4, 4)
    inputs = Processor(tokenizer, VISION, PromptFormat("chat", system="Be brief."))("What?", image)
    ids, places = inputs["input_ids"][0], inputs["image_ids"][0]
    assert (places == 0).sum() == 4
    text = tokenizer.decode(ids[places < 0])
    assert "Be brief." in text
    assert text.index("user") < text.index("\nWhat?")
    raw = Processor(tokenizer, VISION, PromptFormat("chat"))("What?", image, raw=True)
    assert tokenizer.decode(raw["input_ids"][0][raw["image_ids"][0] < 0]) == tokenizer.decode(
        tokenizer("What?").input_ids
    )


def test_places() -> None:
    assert with_places("a <image> b", 1, line=True) == "a <image> b"
    assert with_places("b", 2, line=False) == "<image><image>b"
    parts = [{"type": "text", "text": "a "}, {"type": "image"}]
    assert placed_messages([{"role": "user", "content": parts}], 1)[0]["content"] == "a <image>"
    system = {"role": "system", "content": "s"}
    assert placed_messages([system, {"role": "user", "content": "q"}], 1)[1]["content"] == "<image>\nq"
    for call, told in (
        (lambda: with_places("<image>", 2, line=True), "1 place <image> for 2 images"),
        (lambda: with_places("<image>", 0, line=True), "1 place <image> for 0 images"),
        (lambda: placed_messages([{"role": "user", "content": "<image>"}], 0), "1 place"),
        (lambda: placed_messages([system], 1), "no message of the role user"),
    ):
        with pytest.raises(ValueError, match=told):
            call()


def test_what_a_processor_refuses(base: str) -> None:
    vora = made(base)
    processor = vora.processor
    assert processor is not None
    processor.marked.chat_template = None
    for call, told in (
        (lambda: processor("<image> <image>", [torch.rand(3, 4, 4)]), "2 places"),
        (lambda: processor(["a", "b"], [None]), "2 prompts and the images of 1"),
        (lambda: processor(["a", "<image>"], [None, None]), "prompt 1: 1 place"),
        (lambda: processor([{"role": "user", "content": "a"}], None), "no chat template"),
        (lambda: processor("a", torch.rand(3, 5, 4)), "no multiples of the patch"),
        (lambda: processor("a", "none.png"), "none.png: cannot be read"),
    ):
        with pytest.raises((ValueError, DataError), match=told):
            call()
    vora.processor = None
    with pytest.raises(ValueError, match="no processor"):
        vora.generate("a")


def test_damaged_folders(base: str, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    vora = made(base)
    save(vora, folder)
    file = folder / "vora.json"
    whole, tensors = json.loads(file.read_text()), (folder / "vision.safetensors").read_bytes()
    for changed, told in (
        ({"format": 2}, "format 2"),
        ({"blocks": "x"}, "blocks: expected a whole number"),
        ({"blocks": 9}, "has 2 blocks"),
        ({"mask": "none"}, "mask"),
        ({"vision": {**whole["vision"], "patch": 3}}, "vora.json: vision.size: 8 is not a multiple"),
        ({"vision": {**whole["vision"], "width": 16}}, "has the shape"),
        ({"extra": 1}, "extra"),
    ):
        file.write_text(json.dumps({**whole, **changed}))
        with pytest.raises(ValueError, match=told):
            vision.load(folder)
    file.write_text("{")
    with pytest.raises(FormatError, match="not valid JSON"):
        vision.load(folder)
    file.write_text(json.dumps(whole))
    for content, told in ((b"x", "vision.safetensors"), (tensors[:-4], "vision.safetensors")):
        (folder / "vision.safetensors").write_bytes(content)
        with pytest.raises(FormatError, match=told):
            vision.load(folder)
    (folder / "vision.safetensors").unlink()
    with pytest.raises((FormatError, OSError), match=r"vision\.safetensors"):
        vision.load(folder)
    with pytest.raises(FormatError, match="no model that sees"):
        vision.load(ASSETS)
    with pytest.raises(FormatError, match="no model that sees"):
        vision.load(tmp_path / "nowhere")


def test_nothing_that_is_not_finite_is_saved(base: str, tmp_path: Path) -> None:
    vora = made(base)
    with torch.no_grad():
        vora.embedding.out.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in out\.weight"):
        save(vora, tmp_path / "a")
    assert not (tmp_path / "a").exists()
