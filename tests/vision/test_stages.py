"""The stages as commands: pretrain, merge, tune, generate, eval; resuming; rows that are refused."""

import base64
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from command import reparam
from models import save_base
from PIL import Image
from seeing import vit
from small_trainer import At
from transformers import AutoModelForCausalLM, TrainerCallback

from reparam import vision
from reparam.errors import ConfigError
from reparam.vision.config import VisionConfig, resolve_stage

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}
PIXELS = ("--vision.patch", 2, "--vision.size", 4, "--vision.width", 8)
SHORT = ("--max_steps", 4, "--batch_size", 4, "--lr", 0.02, "--method.r", 4, "--data.score_rows", 2)


def picture(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 6), COLORS[color]).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base, a teacher, and rows of every format, with images in files and in the rows."""
    folder = tmp_path_factory.mktemp("seeing")
    save_base(folder / "base")
    vit().save_pretrained(folder / "vit")
    (folder / "pictures").mkdir()
    rows: list[dict[str, Any]] = []
    for number in range(4):
        for name in COLORS:
            path = f"pictures/{name}{number}.png"
            (folder / path).write_bytes(picture(name))
            encoded = base64.b64encode(picture(name)).decode()
            rows += [
                {"image": path, "text": f"a {name} picture"},
                {
                    "images": [path, f"data:image/png;base64,{encoded}"],
                    "prompt": "a <image> b <image>",
                    "completion": name,
                },
            ]
    rows += [{"text": f"x = {number}"} for number in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pretrain(place: Path, output: Path, *more: object) -> int:
    rows, base = place / "rows.jsonl", place / "base"
    return reparam(
        "vision", "pretrain", "--base.path", base, "--data.train", rows, "-o", output, *PIXELS, *SHORT, *more
    )


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    assert pretrain(place, place / "run", "--vision.teacher", place / "vit", "--logging_steps", 1) == 0
    return place / "run"


@pytest.fixture(scope="module")
def merged(run: Path) -> Path:
    assert reparam("vision", "merge", run.parent / "merged", "--from", run) == 0
    return run.parent / "merged"


def tensors(run: Path) -> dict[str, torch.Tensor]:
    vora = vision.load(run)
    return {**vora.embedding.state_dict(), **vora.adapter.tensors()}


def history(run: Path) -> list[dict[str, Any]]:
    entries = json.loads((run / "figures.json").read_text())["history"]
    timed = ("runtime", "per_second")
    return [{key: value for key, value in entry.items() if not key.endswith(timed)} for entry in entries]


def test_a_run_says_what_it_does_and_keeps_losses_apart(run: Path) -> None:
    figures = json.loads((run / "figures.json").read_text())
    logged = [entry for entry in figures["history"] if "loss_distillation" in entry]
    assert len(logged) == 4
    assert all(len(entry["loss_distillation_by_pair"]) == 2 for entry in logged)
    assert figures["rows with images"] == 24
    assert figures["tokens of an image"] == 4
    files = {file.name for file in (run / "vora").rglob("*") if file.is_file()}
    assert files == {"vora.json", "vision.safetensors", "prompt_format.json", "adapter.json", "adapter.safetensors"}


def test_the_preview_shows_the_place_of_an_image(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(place, place / "dry", "--dry-run") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "<image>⟦a" in told
    assert "<image> stands for 4 tokens (2 x 2 patches of 2 pixels)" in told
    assert "[vision]" in told
    assert not (place / "dry").exists()


def test_resuming_equals_going_through(place: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that a signal stops after two steps, and goes on, has the same tensors and log, bit for bit."""
    import reparam.vision.run

    stop: TrainerCallback = At(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    place_files = reparam.vision.run.place_files
    with monkeypatch.context() as patched:
        patched.setattr(
            reparam.vision.run,
            "place_files",
            lambda callbacks, run: (callbacks.append(stop), place_files(callbacks, run)),
        )
        given = ("--vision.teacher", place / "vit", "--logging_steps", 1)
        assert pretrain(place, tmp_path / "run", *given) == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / "vora").exists()
    assert pretrain(place, tmp_path / "run", *given) == 0
    first, second = tensors(run), tensors(tmp_path / "run")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert history(run) == history(tmp_path / "run")


def test_a_merged_model_equals_the_adapter_and_stock_tools_load_it(run: Path, merged: Path) -> None:
    image = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for folder in (run, merged):
        vora = vision.load(folder)
        with torch.no_grad():
            found.append(vora(**vora.processor("a", image)).logits)
    assert torch.allclose(*found, atol=1e-4)
    AutoModelForCausalLM.from_pretrained(merged / "language")


def test_inspect_shows_the_adapter(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reparam("inspect", run, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert "model.layers.0.self_attn.q_proj" in json.dumps(found["sites"])
    told = found["vision"]
    assert (told["blocks"], told["blocks of the language model"], told["mask"]) == (2, 2, "image")
    embedding = vision.load(run).embedding
    assert told["embedding"]["parameters"] == sum(p.numel() for p in embedding.parameters())
    assert told["embedding"]["norms"]["positions"] == pytest.approx(embedding.positions.norm().item())


def test_inspect_draws_the_attention_of_an_answer(
    place: Path, run: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = place / "pictures" / "red0.png"
    asked = ("--image", image, "--prompt", "a", "--plot", tmp_path / "x")
    for folder in (run, merged):
        given = ("--image", image, "--prompt", "a picture of", "--plot", tmp_path / folder.name)
        assert reparam("inspect", folder, *given, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert (tmp_path / folder.name / "attention.png").read_bytes()[:4] == b"\x89PNG"
        assert found["attention"]["answer"] == vision.load(folder).generate("a picture of", [image], max_new_tokens=16)
        assert sum(map(sum, found["attention"]["patches"][0])) == pytest.approx(
            sum(found["attention"]["share by block"]) / 2, rel=1e-4
        )
    assert reparam("inspect", merged, *given) == 2  # the picture is there
    assert "holds attention.png" in capsys.readouterr().err
    for folder, wrong, told in (
        (run, (*asked[:2], *asked[4:]), "--image needs a question"),
        (run, ("--image", image, "--prompt", "a"), "pass --plot FOLDER"),
        (run, ("--prompt", "a"), "pass --image FILE"),
        (place / "base", ("--image", image, "--prompt", "a"), "holds none"),
        (
            run,
            ("--image", place / "rows.jsonl", "--prompt", "a", "--plot", tmp_path / "x"),
            "no image in a known format",
        ),
    ):
        assert reparam("inspect", folder, *wrong) == 2
        assert told in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "x").exists()


def test_tune_generate_and_eval(place: Path, merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = place / "rows.jsonl"
    given = ("--base.path", merged, "--data.train", rows, "-o", place / "tuned", "--max_steps", 2, "--lr", 0.02)
    assert reparam("vision", "tune", *given, "--data.score_rows", 2) == 0
    assert len(vision.load(place / "tuned").adapter.sites) == 14  # on all blocks
    assert reparam("vision", "merge", place / "second", "--from", place / "tuned") == 0
    capsys.readouterr()
    image = place / "pictures" / "red0.png"
    for option, folder in (("--base", place / "second"), ("--adapter", place / "tuned")):
        settings = ("--image", image, "a picture of", "--max-new-tokens", 4)
        assert reparam("generate", option, folder, *settings) == 0
    said = capsys.readouterr().out.splitlines()
    expected = vision.load(place / "second").generate("a picture of", [str(image)], max_new_tokens=4)
    assert expected in "\n".join(said)
    assert reparam("eval", rows, "--base", place / "second", "--json") == 0
    scores = json.loads(capsys.readouterr().out)["base"]
    assert [score["name"] for score in scores] == [
        "loss per token",
        "loss per token with images",
        "loss per token of text alone",
        "exact match",
    ]
    assert scores[0]["rows"] == 28


def test_answers_are_counted_and_shown_during_training(
    place: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a rate at which nothing changes, the answers are those of the base, and the run stops early, in vain."""
    rows, out = place / "rows.jsonl", tmp_path / "run"
    given: tuple[object, ...] = ("--base.path", merged, "--data.train", rows, "--data.valid", rows, "-o", out)
    given = (*given, "--run.metric", "exact_match", "--run.eval_rows", 2, "--run.samples", 2, "--run.eval_every", 1)
    given = (*given, "--run.patience", 1, "--max_steps", 3, "--lr", 1e-8, "--data.score_rows", 0)
    assert reparam("vision", "tune", *given, "--json") == 1
    told = capsys.readouterr()
    assert "does not change any output" in told.err
    events = [json.loads(line) for line in told.out.splitlines()]
    samples = [event for event in events if event["event"] == "sample"]
    assert [sample["expected"] for sample in samples] == ["a red picture", "red"] * 2  # of two evaluations
    (best,) = [event for event in events if event["event"] == "best"]
    assert (best["metric"], best["stopped_early"]) == ("exact_match", True)
    picture = place / "pictures" / "red0.png"
    said = vision.load(merged).generate("a <image> b <image>", [picture, picture], raw=True, max_new_tokens=40)
    assert samples[1]["given"]
    assert said.startswith(samples[1]["given"])


@pytest.mark.parametrize("wish", ["drop", "truncate"])
def test_rows_that_are_too_long(place: Path, tmp_path: Path, wish: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Captions have more tokens than rows with two images."""
    long = [f"a picture {'of ' * 9}red" for _ in range(2)]
    path = "pictures/red0.png"
    rows = [{"image": path, "text": text} for text in ("a red picture", *long)]
    rows += [{"images": [path, path], "prompt": f"{'a ' * 12}<image> b <image>", "completion": "red"}] * 2
    file = place / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:1] * 3]))
    given = ("--base.path", place / "base", "--data.train", file, "--data.valid", place / "rows.jsonl")
    given = (
        *given,
        "-o",
        tmp_path / "run",
        "--data.max_length",
        16,
        "--data.too_long",
        wish,
        "--dry-run",
        "--json",
        "--method.r",
        4,
    )
    assert reparam("vision", "pretrain", *given, *PIXELS) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (told,) = [event for event in events if event["event"] == "vision"]
    numbers = {key: [int(name.rpartition(":")[2]) for name in told[key]] for key in ("cut", "left_out")}
    expected = {"drop": {"cut": [], "left_out": [2, 3, 4, 5]}, "truncate": {"cut": [2, 3], "left_out": [4, 5]}}
    assert numbers == expected[wish]
    assert told["rows_with_images"] == {"drop": 4, "truncate": 6}[wish]


def test_mistakes(place: Path, run: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = place / "rows.jsonl", tmp_path / "out"
    tune = ("vision", "tune", "--data.train", rows, "-o", out)
    for call, told in (
        (lambda: pretrain(place, out, "--vision.blocks", 3), "vision.blocks: 3: the language model has 2 blocks"),
        (lambda: pretrain(place, out, "--vision.size", 5), "vision.size: 5 is not a multiple"),
        (lambda: pretrain(place, out, "--vision.weight", 2), "no effect without vision.teacher"),
        (lambda: pretrain(place, out, "--vision.teacher", tmp_path / "none"), "no such folder"),
        (lambda: pretrain(place, out, "--vision.teacher", place / "vit", "--vision.blocks", 1), "--vision.blocks 2"),
        (lambda: pretrain(place, out, "--data.max_length", 10), "rows.jsonl:2: "),
        (lambda: pretrain(place, out, "--packing"), "data.packing: the training of models that see"),
        (lambda: pretrain(place, out, "--method", "molora"), "cannot be merged"),
        (lambda: pretrain(place, run), "holds a run with other settings"),
        (lambda: reparam(*tune, "--base.path", place / "base"), "holds no model that sees"),
        (lambda: reparam(*tune, "--base.path", run), "is not merged"),
        (lambda: reparam("vision", "merge", out, "--from", merged), "is merged already"),
        (lambda: reparam("vision", "merge", out, "--from", tmp_path), "no model that sees"),
        (lambda: reparam("vision", "merge", merged, "--from", run), "not empty"),
        (lambda: reparam("vision", "merge", run / "vora" / "x", "--from", run), "lies in the folder of the run"),
        (lambda: reparam("merge", out, "--adapter", run), "merge it with `reparam vision merge"),
        (lambda: reparam("generate", "--base", place / "base", "--image", "a.png", "x"), "base reads text alone"),
        (lambda: reparam("generate", "--base", merged, "--image", "none.png", "x"), "none.png: cannot be read"),
        (lambda: reparam("generate", "--base", merged, "--image", "a.png"), "needs a prompt"),
        (lambda: reparam("generate", "--base", merged, "--compare", "x"), "--compare is not for models that see"),
    ):
        assert call() == 2, told
        assert told in " ".join(capsys.readouterr().err.split()), told
        assert not out.exists()


def test_rows_that_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All problems of a file together, each with its line, and nothing is written."""
    (place / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\nx")
    lines = {
        '{"image": "none.png", "text": "a"}': "no such file below",
        '{"image": "../secret.png", "text": "a"}': "leads out of the folder",
        '{"image": "damaged.png", "text": "a"}': "no image in a known format",
        '{"image": "pictures/red0.png", "prompt": "<image> <image>", "completion": "a"}': "2 places",
        '{"prompt": "<image>", "completion": "a"}': "1 place <image> for 0 images",
        '{"image": "pictures/red0.png", "prompt": "a", "completion": "<image>"}': "an answer holds <image>",
        '{"image": "pictures/red0.png", "images": [], "text": "a"}': '"image" and "images" are both given',
        '{"images": "pictures/red0.png", "text": "a"}': '"images" must be a list',
        '{"image": "https://example.com/a.png", "text": "a"}': "is an address",
        '{"image": "pictures/red0.png", "words": "a"}': "expected",
    }
    (place / "bad.jsonl").write_text("\n".join(lines))
    out = place / "bad"
    given = ("--base.path", place / "base", "--data.train", place / "bad.jsonl", "-o", out)
    assert reparam("vision", "pretrain", *given, *PIXELS) == 2
    told = " ".join(capsys.readouterr().err.split())
    for number, problem in enumerate(lines.values(), start=1):
        assert f"bad.jsonl:{number}: " in told, problem
        assert problem in told, problem
    assert not out.exists()
    (place / "text.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    given = ("--base.path", place / "base", "--data.train", place / "text.jsonl", "-o", out)
    assert reparam("vision", "pretrain", *given, *PIXELS) == 2
    assert "no row has an image" in capsys.readouterr().err


def test_defaults_and_files_of_a_stage(tmp_path: Path) -> None:
    found = resolve_stage("pretrain", None, {"vision.size": 28, "vision.mean": "0.5"})
    assert (found.train.method.r, found.train.method.scaling) == (64, "none")  # type: ignore[attr-defined]
    assert (found.train.optim.schedule, found.train.data.max_length) == ("constant_with_warmup", 2048)
    assert found.vision == VisionConfig(size=28, mean=(0.5,))
    (tmp_path / "a.toml").write_text(found.dump())
    assert resolve_stage("pretrain", tmp_path / "a.toml", {}) == found
    assert resolve_stage("tune", None, {}).train.optim.schedule == "cosine"
    assert resolve_stage("pretrain", None, {"method.alpha": 8}).train.method.scaling != "none"  # type: ignore[attr-defined]
    for stage, given, told in (
        ("tune", {"vision.size": 28}, "has its own"),
        ("pretrain", {"vision.sise": 28}, "did you mean 'size'"),
        ("pretrain", {"vision.channels": 2}, "expected 1 or 3"),
        ("pretrain", {"run.metric": "reward_margin"}, "run.metric"),
    ):
        with pytest.raises(ConfigError, match=told):
            resolve_stage(stage, None, given)  # type: ignore[arg-type]
