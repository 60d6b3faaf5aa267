"""Adapters on vision-language models by the commands: train, resume, generate, eval, merge, NF4, mixtures."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from command import reparam
from PIL import Image
from safetensors.torch import load_file
from small_trainer import At
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor
from vision_language import BASES

import reparam as library
from reparam.data.encode import encode
from reparam.hf.models import load_base
from reparam.images.rows import ImageRows
from reparam.images.seeing import Seeing, seeing_of
from reparam.sites.walk import storages_in
from reparam.train import run as training

SHORT = ("--max_steps", 2, "--batch_size", 4, "--lr", 0.02, "--data.score_rows", 1, "--method.r", 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, and rows with one image, two, and none."""
    folder = tmp_path_factory.mktemp("seen")
    for number, size in enumerate([(9, 7), (24, 8), (8, 20)]):
        Image.new("RGB", size, (200, 40 * number, 10)).save(folder / f"{number}.png")
    chats = [
        {
            "image": f"{number % 3}.png",
            "messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": f"{number}"}],
        }
        for number in range(5)
    ]
    raw = [{"images": ["0.png", "1.png"], "prompt": "<image> and <image>:", "completion": f" {n}"} for n in range(3)]
    texts = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"yes {n}"}]}
        for n in range(3)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*chats, *raw, *texts]))
    return folder


def base(place: Path, name: str) -> Path:
    if not (place / name).exists():
        (place / name).mkdir()
        BASES[name](place / name)
    return place / name


def train(place: Path, name: str, output: Path, *more: object) -> int:
    rows = place / "rows.jsonl"
    return reparam("train", "--base.path", base(place, name), "--data.train", rows, "-o", output, *SHORT, *more)


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    assert train(place, "llava", place / "run", "--logging_steps", 1, "--max_steps", 4) == 0
    return place / "run"


def batch(place: Path, name: str) -> tuple[Seeing, dict[str, Any]]:
    """The inputs of a row with one image, a row with two, and a row with none."""
    seeing = seeing_of(str(base(place, name)))
    assert seeing is not None
    rows = list(ImageRows([place / "rows.jsonl"], found=seeing.found))
    encoded = encode([rows[0], rows[5], rows[8]], seeing.tokenizer, max_length=256, images=seeing)
    found = seeing.collate([seeing.rows(encoded)[number] for number in range(3)])
    return seeing, {key: value for key, value in found.items() if key not in ("row", "labels")}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "adapter" / "adapter.safetensors")
    assert found
    return found


@pytest.mark.parametrize("name", ["qwen2.5-vl", "gemma3", "idefics3"])
def test_each_class_trains_on_its_language_model(
    place: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(place, name, tmp_path / "run") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "its outputs equal those of the trained one bit for bit" in told
    own = tensors(tmp_path / "run")
    assert len(own) == 28  # A and B of seven maps in two blocks
    assert all(".language_model." in key or ".text_model." in key for key in own)
    assert any(bool(value.any()) for key, value in own.items() if key.endswith(".B"))


def test_resuming_equals_going_through(place: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that a signal stops after two steps, and goes on, has the same tensors and log, bit for bit."""
    stop = At(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    place_files = training.place_files
    given = ("--logging_steps", 1, "--max_steps", 4)
    with monkeypatch.context() as patched:
        patched.setattr(
            training,
            "place_files",
            lambda callbacks, run: (callbacks.append(stop), place_files(callbacks, run)),
        )
        assert train(place, "llava", tmp_path / "run", *given) == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / "adapter").exists()
    assert train(place, "llava", tmp_path / "run", *given) == 0
    first, second = tensors(run), tensors(tmp_path / "run")
    assert all(torch.equal(first[key], second[key]) for key in first)
    histories = []
    for folder in (run, tmp_path / "run"):
        entries = json.loads((folder / "figures.json").read_text())["history"]
        histories.append([{k: v for k, v in e.items() if not k.endswith(("runtime", "per_second"))} for e in entries])
    assert histories[0] == histories[1]


def test_a_run_does_not_go_on_with_other_images(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.dumps(json.loads((place / "rows.jsonl").read_text().splitlines()[0]))
    (tmp_path / "rows.jsonl").write_text(f"{rows}\n" * 3)
    picture = tmp_path / "0.png"
    given = ("train", "--base.path", base(place, "llava"), "--data.train", tmp_path / "rows.jsonl", *SHORT)
    Image.new("RGB", (9, 7), "red").save(picture)
    assert reparam(*given, "-o", tmp_path / "run") == 0
    Image.new("RGB", (9, 7), "blue").save(picture)
    assert reparam(*given, "-o", tmp_path / "run") == 2
    assert "the content of the images has changed" in " ".join(capsys.readouterr().err.split())


def test_generate_and_eval(place: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert reparam("generate", "-a", run, "--image", place / "0.png", "--chat", "what?", "--max-new-tokens", 3) == 0
    said = capsys.readouterr().out
    seeing, _ = batch(place, "llava")
    model = AutoModelForImageTextToText.from_pretrained(place / "llava").eval()
    library.load(model, run / "adapter")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nwhat?"}]}]
    text = seeing.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    image = Image.open(place / "0.png").convert("RGB")
    made = seeing.processor(text=[text], images=[[image]], return_tensors="pt", add_special_tokens=False)
    out = model.generate(**made, max_new_tokens=3, do_sample=False, pad_token_id=1)
    expected = seeing.tokenizer.decode(out[0, made["input_ids"].shape[1] :], skip_special_tokens=True)
    assert " ".join(expected.split()) in " ".join(said.split())
    assert reparam("eval", place / "rows.jsonl", "-a", run, "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    names = ["loss per token", "loss per token with images", "loss per token of text alone", "exact match"]
    assert [score["name"] for score in scores["adapter"]] == names
    whole, seen, text_alone = (scores["base"][number]["value"] for number in range(3))
    assert min(seen, text_alone) < whole < max(seen, text_alone)


@torch.no_grad()
def test_a_merged_model_is_a_stock_folder_with_its_processor(place: Path, run: Path) -> None:
    assert reparam("merge", place / "merged", "-a", run) == 0
    _, inputs = batch(place, "llava")
    adapted = AutoModelForImageTextToText.from_pretrained(place / "llava").eval()
    library.load(adapted, run / "adapter")
    merged = AutoModelForImageTextToText.from_pretrained(place / "merged").eval()
    torch.testing.assert_close(merged(**inputs).logits, adapted(**inputs).logits, rtol=0, atol=1e-4)
    before, after = (AutoProcessor.from_pretrained(place / name) for name in ("llava", "merged"))
    image = Image.open(place / "1.png").convert("RGB")
    made = [each(text=["<image>a"], images=[image], return_tensors="pt") for each in (before, after)]
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
    assert before.chat_template == after.chat_template


def test_nf4_goes_under_the_language_model_alone(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(place, "llava", tmp_path / "run", "--base.storage", "nf4") == 0
    assert "quantized 14 matrices into nf4" in " ".join(capsys.readouterr().out.split())
    model = load_base(str(place / "llava"), storage=library.NF4())
    assert len(storages_in(model)) == 14
    assert all(path.startswith("model.language_model.") for path in storages_in(model))
    assert reparam("generate", "-a", tmp_path / "run", "-i", place / "0.png", "a", "--max-new-tokens", 1) == 0


def test_parts_and_the_whole_projector_can_be_trained(place: Path, tmp_path: Path) -> None:
    given = ("--adapter.targets", "language.attention,vision", "--adapter.modules_to_save", "multi_modal_projector")
    assert train(place, "llava", tmp_path / "run", *given) == 0
    own = tensors(tmp_path / "run")
    assert sum(".vision_tower." in key for key in own) == 24
    assert sum(".language_model." in key for key in own) == 16
    assert any("multi_modal_projector" in key for key in own)


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl", "gemma3", "idefics3"])
@torch.no_grad()
def test_rows_of_a_mixed_batch_equal_their_adapter_alone(place: Path, name: str) -> None:
    _, inputs = batch(place, name)
    model = AutoModelForImageTextToText.from_pretrained(base(place, name)).double().eval()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    for number, adapter in enumerate(("one", "two")):
        made = library.attach(model, "lora", r=2, name=adapter)
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.1 * noise)
    names = ["one", "two", None]
    with library.select(model, names):
        mixed = model(**inputs).logits
    for row, adapter in enumerate(names):
        with library.select(model, adapter):
            alone = model(**inputs).logits
        kept = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(mixed[row, kept], alone[row, kept], rtol=0, atol=1e-5)
    assert (mixed[0] - mixed[2]).abs().max() > 0.01
    library.attach(model, "lora", r=2, name="three", targets=["vision"])
    with pytest.raises(ValueError, match=r"'three' is also on .* in the vision part"):
        library.select(model, ["one", "three", None])


def test_llava_mole_routes_each_token_to_one_expert_of_the_feed_forward_maps(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each token, of images too, gets base + p_k * s * B_k A_k x of its likeliest expert k, the same in all maps."""
    assert train(place, "llava", tmp_path / "run", "--method", "llava_mole") == 0
    entries = json.loads((tmp_path / "run" / "figures.json").read_text())["history"]
    assert any(0.9 < entry.get("loss_switch_balance", 0) < 3.1 for entry in entries)  # 1 if balanced, 3 at collapse
    _, inputs = batch(place, "llava")
    model = AutoModelForImageTextToText.from_pretrained(place / "llava").eval()
    model.requires_grad_(False)
    plain = model(**inputs).logits
    fresh = library.attach(model, "llava_mole", r=2, name="fresh")
    assert torch.equal(model(**inputs).logits, plain)
    assert not any("vision" in path or "projector" in path for path in fresh.sites)
    library.remove(model, "fresh")
    library.load(model, tmp_path / "run" / "adapter")
    own = tensors(tmp_path / "run")
    scale = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())["settings"]
    block = model.model.language_model.layers[0].mlp
    kept: dict[str, Any] = {}
    for part in ("gate_proj", "up_proj", "down_proj"):
        getattr(block, part).register_forward_hook(lambda m, args, out, part=part: kept.update({part: (args[0], out)}))
    with torch.no_grad():
        model(**inputs)
    raw = AutoModelForImageTextToText.from_pretrained(place / "llava").model.language_model.layers[0].mlp
    weight, bias = (own[f"reparam_shared.routers.model/language_model/layers/0/mlp.{e}"] for e in ("weight", "bias"))
    chances = F.softmax(kept["gate_proj"][0] @ weight.T + bias, -1)
    chosen = chances.argmax(-1)
    assert scale["n"] == 3
    for part, (x, out) in kept.items():
        a, b = (own[f"model.language_model.layers.0.mlp.{part}.{key}"] for key in "AB")
        each = torch.stack([x @ a.chunk(3)[k].T @ b.chunk(3, 1)[k].T for k in range(3)], -1)
        added = each.gather(-1, chosen[..., None, None].expand(*x.shape[:2], len(b), 1)).squeeze(-1)
        expected = getattr(raw, part)(x) + scale["alpha"] / scale["r"] * chances.amax(-1, keepdim=True) * added
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (("--data.packing",), "data.packing: training of a vision-language model does not support it"),
        (("--data.streaming",), "data.streaming: training of a vision-language model does not support it"),
        (("--objective", "dpo"), "run.objective: training of a vision-language model does not support dpo"),
        (
            ("--method", "task_gated", "--method.r", 8),
            "method.name: training of a vision-language model does not support task_gated",
        ),
        (("--adapter.targets", "visoin"), "'visoin' matches no module (did you mean 'vision' or 'vision.mlp'?)"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    place: Path, tmp_path: Path, given: tuple[object, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(place, "llava", tmp_path / "run", *given) == 2
    assert problem in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
