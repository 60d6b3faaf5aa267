"""Every shell command of README.md and docs/*.md runs, page by page and in order, with less work to do."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from command import reparam as run
from models import save_base
from transformers import AutoModelForCausalLM

import reparam

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROWS = {"train": 60, "valid": 12, "test": 12}  # kept of each file of a task
# Arguments appended to a verb's, so that a page takes seconds; the last of two values of an option counts.
TRAINING = "--max_steps 2 --batch_size 2 --data.score_rows 2 --max_length 64 --eval_steps 2 --save_steps 2"
SMALLER = {
    "train": TRAINING,
    "compare": f"{TRAINING} --minutes 0.05 --seeds 1 --rates 1e-3 --rows 2",
    "intrinsic": f"{TRAINING} --grid 100:300 --each 1 --rates 1e-2 --full-rates 1e-3 --metric saved",
    "generate": "--max-new-tokens 4",
}
HUB = ("owner/name", "rows.jsonl")  # a data set of the hub, and a file in its place
SEARCH = "--budget 5 --max-length 64"  # of compose --search


def commands(page: Path) -> list[list[str]]:
    """The arguments of every command in the code blocks of a page that begin with `reparam `."""
    found = []
    for block in re.findall(r"```\n(reparam .*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                assert words[0] == "reparam", line
                found += [words[1:end]] if words[1] != "serve" else []  # test_serving_page.py
                words = words[end + 1 :]
    return found


def smaller(arguments: list[str]) -> list[str]:
    """The same command with less to do."""
    less = SEARCH if "--search" in arguments else SMALLER.get(arguments[0], "")
    here = [word.replace(*HUB) for word in arguments]
    return [*here, *less.split()]


def written(arguments: list[str]) -> set[str]:
    """The output folders of a command."""
    places = {i + 1 for i, word in enumerate(arguments) if word in ("-o", "--output")}
    places |= {"merge": {1}, "compress": {2}, "export": {2}, "quantize": {2}}.get(arguments[0], set())
    return {arguments[place] for place in places}


def cut(source: Path, target: Path) -> None:
    """Copy the first rows of a file, with two tasks in turn."""
    rows = [json.loads(line) for line in source.read_text().splitlines()[: ROWS[source.stem]]]
    for index, row in enumerate(rows):
        row["task"] = ("count", "defaults")[index % 2]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model like the embedded one, with its tokenizer, but narrow and with two layers."""
    folder = tmp_path_factory.mktemp("embedded") / "model"
    config = json.loads((ROOT / "assets" / "tiny-python" / "config.json").read_text())
    narrow = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    save_base(folder, **{key: config[key] for key in ("tie_word_embeddings", "dtype")}, **narrow)
    return folder


@pytest.fixture(scope="module")
def adapters(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished adapters on this model, under the names that the pages use."""
    folder = tmp_path_factory.mktemp("finished")
    model = AutoModelForCausalLM.from_pretrained(embedded)
    for seed, name in enumerate(("a", "b", "c", "first", "second")):
        adapter = reparam.attach(model, reparam.LoRA(r=2, seed=seed))
        for update in adapter.updates.values():
            torch.nn.init.normal_(update.B, std=0.2)  # type: ignore[arg-type]
        adapter.save(folder / name)
        reparam.remove(model, "default")
    return {f"out/{path.name}": path for path in folder.iterdir()}


@pytest.fixture
def place(embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with the model as `assets/tiny-python` and `model`, and the files that the pages use."""
    (tmp_path / "assets").mkdir()
    for link in ("assets/tiny-python", "model"):
        (tmp_path / link).symlink_to(embedded)
    tasks = ROOT / "assets" / "tasks"
    for source in tasks.glob("*/*.jsonl"):
        cut(source, tmp_path / "assets" / "tasks" / source.relative_to(tasks))
    files = {"rows": "train", "few": "valid", "valid": "valid", "held-out": "valid", "test": "test"}
    for name, part in files.items():
        cut(tasks / "signatures" / f"{part}.jsonl", tmp_path / f"{name}.jsonl")
    reviews = [{"text": text, "label": label} for text, label in (("fine", "good"), ("dull", "bad"))] * 20
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("default::UserWarning:reparam")  # which the command line prints
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, place: Path, adapters: dict[str, Path]) -> None:
    """Finished adapters exist unless the page makes them; its TOML is `plan.toml`, its YAML `axolotl.yaml`."""
    found = commands(page)
    made = set().union(*map(written, found))
    (place / "out").mkdir()
    for name, folder in adapters.items():
        if name not in made:
            (place / name).symlink_to(folder)
    for plan in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL):
        (place / "plan.toml").write_text(plan)
    for foreign in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        (place / "axolotl.yaml").write_text(foreign)
    for arguments in found:
        assert run(*smaller(arguments)) == 0, shlex.join(["reparam", *arguments])


def test_no_command_is_outside_a_fence() -> None:
    assert not [page.name for page in PAGES if re.search(r"^ +reparam ", page.read_text(), re.MULTILINE)]
