"""What vision-language models get for rows with images, judged by their processors, TRL's collator and themselves."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
from vision_language import BASES

from reparam.data.batches import Encoded
from reparam.data.encode import encode
from reparam.data.rows import read_rows
from reparam.errors import BaseError, DataError
from reparam.evaluation.score import answer
from reparam.hf.processors import load_processor, sees, words_of
from reparam.images.rows import ImageRows, WithoutImages
from reparam.images.seeing import Seeing, seeing_of

SIZES = {"wide": (21, 9), "small": (8, 8), "high": (10, 30)}
ROWS: list[dict[str, Any]] = [
    {"image": "wide.png", "messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]},
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "first"},
                    {"type": "image", "image": "small.png"},
                    {"type": "text", "text": "\nsecond "},
                    {"type": "image", "image": "high.png"},
                ],
            },
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "and?"},
            {"role": "assistant", "content": "blue"},
        ]
    },
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    {"images": ["small.png", "wide.png"], "prompt": "a <image> b <image>:", "completion": " c"},
]


class Case(NamedTuple):
    folder: Path
    seeing: Seeing
    encoded: Encoded
    rows: list[Any]


@functools.cache
def base(name: str, place: Path) -> Path:
    (place / name).mkdir()
    BASES[name](place / name)
    for picture, size in SIZES.items():
        image = Image.new("RGB", size, (200, 30, 40))
        image.putpixel((1, 2), (0, 255, 0))
        image.save(place / f"{picture}.png")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(params=BASES)
def case(request: pytest.FixtureRequest, place: Path) -> Case:
    base(request.param, place)
    folder = place / request.param
    seeing = seeing_of(str(folder))
    assert seeing is not None
    rows = list(ImageRows([place / "rows.jsonl"], found=seeing.found))
    return Case(folder, seeing, encode(rows, words_of(str(folder)), max_length=512, images=seeing), rows)


def messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages as processors take them."""
    found = copy.deepcopy(row["messages"])
    if "image" in row:
        text = {"type": "text", "text": f"\n{found[0]['content']}"}
        found[0]["content"] = [{"type": "image"}, text]
    for message in found:
        if isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
    return found


def pictures(case: Case, *names: str) -> list[Any]:
    return [Image.open(case.folder.parent / f"{name}.png").convert("RGB") for name in names]


IMAGES = (("wide",), ("small", "high"), (), ("small", "wide"))


def judged(case: Case, text: str, images: tuple[str, ...]) -> list[int]:
    given = {"images": [pictures(case, *images)]} if images else {}
    made = case.seeing.processor(text=[text], add_special_tokens=False, return_tensors="pt", **given)
    return list(made["input_ids"][0].tolist())


def test_tokens_are_those_of_the_processor_and_answers_alone_carry_loss(case: Case) -> None:
    render = case.seeing.tokenizer.apply_chat_template
    for number in range(3):
        chat = messages(ROWS[number])
        ids, labels = case.encoded[number]["input_ids"], case.encoded[number]["labels"]
        assert ids.tolist() == judged(case, render(chat, tokenize=False), IMAGES[number])
        expected = torch.full_like(ids, -100)
        for turn in range(1, len(chat), 2):
            before = judged(case, render(chat[:turn], tokenize=False, add_generation_prompt=True), IMAGES[number])
            upto = judged(case, render(chat[: turn + 1], tokenize=False), IMAGES[number])
            expected[len(before) : len(upto)] = ids[len(before) : len(upto)]
        assert torch.equal(labels, expected)
    raw = case.seeing.written("a <image> b <image>:")
    prompt = judged(case, raw, IMAGES[3])
    ids, labels = case.encoded[3]["input_ids"], case.encoded[3]["labels"]
    assert ids[: len(prompt)].tolist() == prompt
    assert torch.equal(labels[len(prompt) :], ids[len(prompt) :])
    assert bool((labels[: len(prompt)] == -100).all())


def test_with_loss_on_all_the_tokens_of_images_carry_none(case: Case) -> None:
    every = encode(case.rows, words_of(str(case.folder)), max_length=512, images=case.seeing, loss_on="all")
    for number in range(4):
        ids, labels = every[number]["input_ids"], every[number]["labels"]
        of_images = torch.isin(ids, case.seeing.ids)
        assert bool(of_images.any()) == bool(IMAGES[number])
        assert bool((labels[of_images] == -100).all())
        assert int((labels != -100).sum()) > int((case.encoded[number]["labels"] != -100).sum())


def test_a_batch_equals_that_of_trl(case: Case) -> None:
    """TRL's collator for vision-language models, on rows of a question and an answer."""
    if case.folder.name == "smolvlm":
        pytest.skip("its processor renders chats with that of videos, which needs torchvision")
    examples = [case.seeing.rows(case.encoded)[number] for number in (0, 0)]
    ours = case.seeing.collate(examples)
    row = [{"role": "user", "content": "\nwhat?"}], [{"role": "assistant", "content": "red"}]
    collate = DataCollatorForVisionLanguageModeling(case.seeing.processor, completion_only_loss=True)
    theirs = collate([{"prompt": row[0], "completion": row[1], "images": pictures(case, "wide")} for _ in range(2)])
    assert ours.keys() - {"row"} == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def model_of(case: Case) -> Any:
    return AutoModelForImageTextToText.from_pretrained(case.folder, attn_implementation="eager").double().eval()


@torch.no_grad()
def test_a_row_in_a_batch_equals_the_row_alone(case: Case) -> None:
    """Rows with two images, one and none, in one batch; the model itself is the judge."""
    model, rows = model_of(case), case.seeing.rows(case.encoded)

    def logits(batch: dict[str, Any]) -> Tensor:
        given = {key: value for key, value in batch.items() if key not in ("row", "labels")}
        return model(**{k: v.double() if v.is_floating_point() else v for k, v in given.items()}).logits

    together = logits(case.seeing.collate([rows[number] for number in range(4)]))
    for number in range(4):
        alone = logits(case.seeing.collate([rows[number]]))[0]
        torch.testing.assert_close(together[number, : len(alone)], alone, rtol=0, atol=1e-6)


def test_answers_in_a_batch_are_those_of_generate(case: Case) -> None:
    model = AutoModelForImageTextToText.from_pretrained(case.folder).eval()
    found = answer(model, case.seeing.tokenizer, case.rows, max_new_tokens=4, seeing=case.seeing)
    for number in range(3):
        chat = messages(ROWS[number])[:-1]
        text = case.seeing.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        images = {"images": [pictures(case, *IMAGES[number])]} if IMAGES[number] else {}
        made = case.seeing.processor(text=[text], add_special_tokens=False, return_tensors="pt", **images)
        out = model.generate(**made, max_new_tokens=4, do_sample=False, pad_token_id=1, eos_token_id=5)
        told = case.seeing.tokenizer.decode(out[0, made["input_ids"].shape[1] :], skip_special_tokens=True)
        assert found[number].given == told


# ---- rows and bases that are refused


@pytest.fixture(scope="module")
def llava(place: Path) -> Path:
    return base("llava", place) / "llava"


def encoded(llava: Path, *rows: dict[str, Any], max_length: int = 512, **settings: Any) -> tuple[Seeing, Encoded]:
    file = llava.parent / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seeing = seeing_of(str(llava))
    assert seeing is not None
    read = list(ImageRows([file], found=seeing.found))
    return seeing, encode(read, words_of(str(llava)), max_length=max_length, images=seeing, **settings)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"video": "a.mp4", "text": "a"}, "own.jsonl:1: the row has a video"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]},
            "own.jsonl:1: the row has a video",
        ),
        ({"image": "wide.png", "prompt": "<image><image>", "completion": "a"}, "own.jsonl:1: 2 places <image> for 1"),
        ({"image": "none.png", "text": "a"}, "own.jsonl:1: the image 'none.png': there is no such file"),
        ({"image": "../wide.png", "text": "a"}, "own.jsonl:1: the image '../wide.png' leads out of the folder"),
    ],
)
def test_rows_that_cannot_be_used_are_named(llava: Path, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError) as refused:
        encoded(llava, row)
    assert problem in str(refused.value)


def test_a_row_that_is_cut_within_its_images_is_named(llava: Path) -> None:
    row = {"images": ["small.png", "wide.png"], "prompt": "a<image>b<image>c", "completion": "d"}
    seeing, kept = encoded(llava, row, max_length=8, loss_on="all", too_long="truncate")
    with pytest.raises(DataError, match=r"own.jsonl:1: data.max_length cuts the row within an image"):
        seeing.rows(kept)
    with pytest.raises(DataError, match="cuts off the whole answer of 1 row"):
        encoded(llava, row, max_length=8)


def test_a_template_that_leaves_images_out_is_refused(llava: Path) -> None:
    seeing = seeing_of(str(llava))
    assert seeing is not None
    tokenizer = words_of(str(llava))
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% for p in m['content'] %}{{ p['text'] }}{% endfor %}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    read = list(ImageRows([llava.parent / "rows.jsonl"], found=seeing.found))[:1]
    with pytest.raises(DataError, match=r"rows.jsonl:1: 0 images of 1 are left in its tokens"):
        seeing.rows(encode(read, tokenizer, max_length=512, images=seeing))


def test_images_for_a_model_that_reads_text_alone_are_refused(place: Path, llava: Path) -> None:
    with pytest.raises(DataError) as refused:
        list(WithoutImages([place / "rows.jsonl"]))
    told = str(refused.value)
    assert 'rows.jsonl:1: the row has an image ("image"), and the base reads text alone' in told
    assert "rows.jsonl:2: the row has an image, and the base reads text alone" in told
    assert "rows.jsonl:3" not in told
    with pytest.raises(DataError):
        read_rows(place / "rows.jsonl")


def test_a_base_without_its_processor_says_what_is_missing(llava: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((llava / name).read_bytes())
    assert sees(str(tmp_path))
    with pytest.raises(BaseError, match=r"no processor of images could be loaded; copy preprocessor_config\.json"):
        load_processor(str(tmp_path))
    assert words_of(str(tmp_path)).chat_template is None
