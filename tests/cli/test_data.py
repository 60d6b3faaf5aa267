"""`reparam data`: what it prints, and that it refuses what training refuses."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from command import ASSETS, reparam, train
from transformers import AutoModelForCausalLM, AutoTokenizer


def write(file: Path, *rows: object) -> str:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(file)


def chat(*contents: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def told(capsys, *arguments: object, code: int = 0) -> dict:
    capsys.readouterr()
    assert reparam("data", *arguments, "--json") == code
    return json.loads(capsys.readouterr().out)


def test_figures_of_a_file(base, tmp_path, capsys):
    rows = [chat("def f(a):", "a"), chat("def f(b):", "b", "def g(c, d):", "c, d"), chat("def f(a):", "a")]
    file = write(tmp_path / "rows.jsonl", *rows, {**chat("def f(a):", "other"), "id": 7})
    valid = write(tmp_path / "valid.jsonl", chat("def f(a):", "a"))
    found = told(capsys, file, "--base", base, "--data.valid", valid, "--rows", 2)
    tokenizer = AutoTokenizer.from_pretrained(base)
    sizes = [
        len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in (*rows, chat("def f(a):", "other"))
    ]
    assert found["contents"]["chats"] == 4
    assert found["contents"]["messages"] == [2, 4]
    assert found["contents"]["roles"] == {"user": 5, "assistant": 5}
    assert found["tokens"] == sum(sizes)
    assert (found["lengths"]["shortest"], found["lengths"]["longest"]) == (min(sizes), max(sizes))
    assert found["duplicates"] == {"rows": 1, "first": [{"row": f"{file}:3", "same_as": f"{file}:1"}]}
    assert [pair["row"] for pair in found["in_held_out"]["first"]] == [f"{file}:1", f"{file}:3"]
    assert [pair["row"] for pair in found["question_in_held_out"]["first"]] == [f"{file}:4"]
    assert found["cut"]["longer"] == 0
    assert found["recommended_max_length"] == -(-max(sizes) // 8) * 8
    assert found["not_used"] == ["id"]
    assert found["problems"] == []
    masks = [["".join(part["text"] for part in row["parts"] if part["loss"]) for row in found["masks"]]]
    assert masks == [["a<|end|>", "b<|end|>c, d<|end|>"]]


def test_tokens_that_the_base_never_saw_are_named_with_their_number(tmp_path, capsys):
    """transformers adds tokens to the base, as people do for ChatML, and nothing trains them."""
    folder = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny-python")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-python")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", "<|idle|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder, max_shard_size="4MB")
    tokenizer.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    file = write(tmp_path / "rows.jsonl", *(chat("def f(a):", f"a{n}") for n in range(40)))
    found = told(capsys, file, "--base", folder)
    assert {token["token"]: token["times"] for token in found["unseen"]} == {"<|im_start|>": 80, "<|im_end|>": 80}
    assert reparam("data", file, "--base", folder) == 0
    assert "never seen 2 tokens" in capsys.readouterr().out


def test_rows_that_training_refuses_are_refused_and_still_shown(base, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", chat("a " * 60, "b"), *(chat(f"q{n}", "b") for n in range(9)))
    arguments = (file, "--base", base, "--max_length", 20)
    found = told(capsys, *arguments, code=2)
    assert found["cut"] | {"share": None} == {
        "max_length": 20,
        "longer": 1,
        "share": None,
        "lose_loss": 1,
        "lose_answer": 1,
        "first": [f"{file}:1"],
    }
    assert "cuts off the whole answer of 1 row" in found["problems"][0]
    assert reparam("data", *arguments) == 2
    out, err = capsys.readouterr()
    assert "max_length      20 is shorter than 1 row" in out
    assert "cuts off the whole answer" in err
    dropping = told(capsys, *arguments, "--data.too_long", "drop", "--data.bad_rows", "drop")
    assert dropping["lengths"] == found["lengths"]
    assert dropping["cut"] == found["cut"]
    assert (dropping["recommended_max_length"], dropping["problems"]) == (found["recommended_max_length"], [])
    assert train(base, file, tmp_path / "out", "--max_length", 20) == 2
    assert "cuts off the whole answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([chat("q", "a")], "too small to hold one out"),
        ([chat("q"), chat("q", "a")], "no message has the role 'assistant'"),
        ([{"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]}] * 9, "unknown role"),
        ([{"prompt": "a"}], '"prompt" without "completion"'),
    ],
)
def test_the_same_sentence_as_in_training(base, tmp_path, capsys, rows, sentence):
    file = write(tmp_path / "rows.jsonl", *rows)
    assert reparam("data", file, "--base", base) == 2
    assert sentence in capsys.readouterr().err
    assert train(base, file, tmp_path / "out") == 2
    assert sentence in capsys.readouterr().err


def test_without_a_base_what_needs_no_tokenizer_is_shown(tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", *({"prompt": f"q{n % 30}", "completion": "a"} for n in range(40)))
    found = told(capsys, file)
    assert found["duplicates"]["rows"] == 10
    assert found["lengths"] is None
    assert reparam("data", file) == 0
    assert "pass --base MODEL" in capsys.readouterr().out
    assert reparam("data", file, "--plot", tmp_path / "plots") == 2
    assert not (tmp_path / "plots").exists()


def test_a_plot_is_not_replaced_unasked(base, rows, tmp_path, capsys):
    arguments = ("data", rows, "--base", base, "--plot", tmp_path)
    assert reparam(*arguments) == 0
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert reparam(*arguments) == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err
    assert reparam(*arguments, "--overwrite_output_dir") == 0


def test_the_configuration_of_a_run_is_read_and_a_second_file_refused(base, rows, tmp_path, capsys):
    file = tmp_path / "config.toml"
    file.write_text(f'[base]\npath = "{base}"\n[data]\ntrain = "{rows}"\nmax_length = 200\n')
    assert told(capsys, "-c", file, "--rows", 0)["cut"]["max_length"] == 200
    assert reparam("data", rows, "--data", "other.jsonl") == 2
    assert reparam("data") == 2
    assert "data.train must be set" in capsys.readouterr().err


def test_the_histogram_fits_an_encoding_without_blocks(base, rows, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii", write_through=True))
    assert reparam("data", rows, "--base", base) == 0
    assert b"####" in printed.getvalue()
    assert b"\\u" not in printed.getvalue()


def test_a_base_whose_weights_are_elsewhere_says_that_it_cannot_tell(base, rows, tmp_path, capsys):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    assert told(capsys, rows, "--base", folder)["unseen"] is None
