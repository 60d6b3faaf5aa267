"""Runs with a chat template, a system message and thinking of their own, and what later commands make of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import reparam, train
from transformers import AutoTokenizer

from reparam.data.preferences import flat
from reparam.data.templates import PLAIN
from reparam.errors import ConfigError
from reparam.hf.open import open_model
from reparam.io.prompt_format import PromptFormat
from reparam.train.config import resolve
from reparam.train.objectives import objective_of
from reparam.train.reading import tokenizer_of

MINE = "{% for m in messages %}<|user|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}"
MINE += "<|user|>assistant: {% endif %}"


@pytest.fixture(scope="module")
def plain(base, rows, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("plain") / "run"
    settings = ("--data.chat_template", "plain", "--data.system", "List the names.")
    assert train(base, rows, output, *settings) == 0
    return output


def told(folder: Path) -> dict:
    return json.loads((folder / "prompt_format.json").read_text())


def test_the_adapter_says_how_it_is_prompted(plain, base, tmp_path):
    assert told(plain / "adapter") == {
        "rows": "chat",
        "chat_template": PLAIN,
        "system": "List the names.",
        "thinking": None,
    }
    shutil.copytree(plain / "adapter", tmp_path / "copy")
    _, tokenizer, adapter = open_model(base, tmp_path / "copy")
    assert tokenizer.chat_template == PLAIN
    adapter.save(tmp_path / "again")
    adapter.save(tmp_path / "again")
    assert told(tmp_path / "again") == told(plain / "adapter")


def test_eval_scores_as_training_did(plain, base, rows, tmp_path, capsys):
    valid = tmp_path / "valid.jsonl"
    valid.write_text("".join(Path(rows).read_text().splitlines(keepends=True)[:10]))
    output = tmp_path / "run"
    settings = ("--data.chat_template", "plain", "--data.system", "List the names.", "--data.valid", valid)
    assert train(base, rows, output, *settings, "--data.score_rows", 10) == 0
    capsys.readouterr()
    assert reparam("eval", valid, "-a", output, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adapter"] == json.loads((output / "figures.json").read_text())["after"]


def test_a_merged_model_has_the_template(plain, tmp_path):
    assert reparam("merge", tmp_path / "merged", "-a", plain) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == PLAIN


def test_smaller_adapters_and_sums_keep_it(plain, tmp_path):
    assert reparam("compress", plain, tmp_path / "small", "--rank", 2) == 0
    assert told(tmp_path / "small") == told(plain / "adapter")
    assert reparam("compress", plain, tmp_path / "small", "--rank", 1, "--overwrite_output_dir") == 0
    sums = ("compose", plain, plain, "--weights", "0.5,0.5")
    assert reparam(*sums, "-o", tmp_path / "sum", "--format", "peft") == 0
    assert told(tmp_path / "sum") == told(plain / "adapter")


def test_a_run_goes_on_with_the_same_template_and_with_no_other(base, rows, tmp_path, capsys):
    one, two = tmp_path / "one.jinja", tmp_path / "two.jinja"
    one.write_text(MINE)
    two.write_text(MINE)
    assert train(base, rows, tmp_path / "run", "--data.chat_template", one) == 0
    assert train(base, rows, tmp_path / "run", "--data.chat_template", two) == 0
    two.write_text(MINE.replace("assistant: ", "assistant:"))
    assert train(base, rows, tmp_path / "run", "--data.chat_template", two) == 2
    assert "the content of the chat template has changed" in capsys.readouterr().err
    assert train(base, rows, tmp_path / "run", "--data.chat_template", one, "--data.system", "Hm.") == 2
    assert "data.system was None and is now 'Hm.'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("--data.chat_template", "chatml"), "data.chat_template: the chat template chatml ends answers with a token"),
        (("--chat_template", "lama3"), "did you mean 'llama3'"),
        (("--data.thinking", "false"), "data.thinking: nothing in the chat template depends on it"),
        (("--data.thinking", "maybe"), "data.thinking"),
    ],
)
def test_settings_without_effect_are_refused_before_anything_is_written(
    base, rows, tmp_path, capsys, settings, sentence
):
    assert train(base, rows, tmp_path / "run", *settings) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert reparam("data", rows, "--base", base, *settings) == 2
    assert sentence in capsys.readouterr().err


def test_rows_that_are_no_chats_have_no_use_for_them(base, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n} + 1 =", "completion": f" {n + 1}"}) + "\n" for n in range(40)))
    assert train(base, file, tmp_path / "run", "--data.system", "Add.") == 2
    assert "data.system: only chats depend on it" in capsys.readouterr().err
    assert train(base, file, tmp_path / "run") == 0
    assert told(tmp_path / "run" / "adapter")["rows"] == "completion"


def test_a_damaged_file_is_refused_in_one_sentence(plain, tmp_path, capsys):
    shutil.copytree(plain / "adapter", tmp_path / "a")
    file = tmp_path / "a" / "prompt_format.json"
    for content, sentence in (
        ("{", "not valid JSON"),
        ('{"rows": "poems"}', "rows: expected one of"),
        ("{}", "rows: missing"),
    ):
        file.write_text(content)
        assert reparam("generate", "hi", "-a", tmp_path / "a") == 2
        assert sentence in capsys.readouterr().err


def test_preferences_are_framed_as_other_chats_are(base, tmp_path):
    file = tmp_path / "pairs.jsonl"
    pair = {
        "prompt": [{"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "hello"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    file.write_text((json.dumps(pair) + "\n") * 4)
    given = {"base.path": base, "data.train": str(file), "run.objective": "dpo", "data.system": "Be kind."}
    config = resolve(None, given)
    tokenizer = tokenizer_of(config)
    data = objective_of(config).data(config, tokenizer)
    text = tokenizer.decode(flat(data.train)[0]["input_ids"])
    assert text == "<|system|>Be kind.<|end|><|user|>hi<|end|><|assistant|>hello<|end|>"
    assert data.prompt_format == PromptFormat("chat", None, "Be kind.")
    file.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    with pytest.raises(ConfigError, match="only chats depend on it"):
        objective_of(config).data(resolve(None, given | {"data.valid": str(file)}), tokenizer)


def test_a_base_without_a_template_gets_one(base, rows, few, tmp_path, capsys):
    bare = tmp_path / "base"
    shutil.copytree(base, bare)
    (bare / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(bare).chat_template is None
    assert train(bare, rows, tmp_path / "run") == 2
    assert "--data.chat_template plain" in capsys.readouterr().err
    assert reparam("data", rows, "--base", bare, "--data.chat_template", "plain") == 0
    assert train(bare, rows, tmp_path / "run", "--data.chat_template", "plain") == 0
    capsys.readouterr()
    assert reparam("generate", "def f(a):", "-a", tmp_path / "run", "--compare", "--max-new-tokens", 2) == 0
    assert reparam("eval", few, "-a", tmp_path / "run") == 0
    assert reparam("merge", tmp_path / "merged", "-a", tmp_path / "run") == 0
    assert reparam("generate", "def f(a):", "--base", tmp_path / "merged", "--max-new-tokens", 2) == 0
    capsys.readouterr()
    assert reparam("generate", "def f(a):", "--base", bare, "--max-new-tokens", 2) == 2
    assert "--chat-template" in capsys.readouterr().err
    assert reparam("generate", "a", "--base", bare, "--chat-template", "plain", "--max-new-tokens", 2) == 0
