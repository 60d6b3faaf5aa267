"""`reparam generate`: prompts, sampling, files of prompts, several adapters. The judge is transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import reparam, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from reparam.adapter.load import load
from reparam.data.templates import PLAIN
from reparam.evaluation.complete import Sampling, complete

QUESTION = "def f(a, b):"


@pytest.fixture(scope="module")
def runs(base, rows, tmp_path_factory) -> dict[str, Path]:
    """Runs on chats, on chats with another template and a system message, and on completions."""
    place = tmp_path_factory.mktemp("runs")
    sums = place / "sums.jsonl"
    sums.write_text("".join(json.dumps({"prompt": f"{n} + 1 =", "completion": f" {n + 1}"}) + "\n" for n in range(40)))
    assert train(base, rows, place / "chat") == 0
    assert train(base, rows, place / "plain", "--data.chat_template", "plain", "--data.system", "Names.") == 0
    assert train(base, str(sums), place / "completion") == 0
    return {name: place / name for name in ("chat", "plain", "completion")}


def judged(base: str, folder: Path | None, ids: list[int], **settings) -> str:
    """What transformers generates from these ids."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if folder is not None:
        load(model, folder)
    if settings.get("do_sample"):
        torch.manual_seed(settings.pop("seed"))
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        eos_token_id=[5, tokenizer.convert_tokens_to_ids("<|end|>")],
        pad_token_id=1,
        **{"max_new_tokens": 8, "do_sample": False, **settings},
    )
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def chat_ids(base: str, *messages: dict, template: str | None = None) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = tokenizer.apply_chat_template(
        list(messages), chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def plain_ids(base: str, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(base)(text)["input_ids"]


def said(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert reparam("generate", *arguments, "--max-new-tokens", 8) == 0
    return capsys.readouterr().out.removesuffix("\n")


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def test_an_adapter_is_prompted_as_it_was_trained(runs, base, capsys):
    assert said(capsys, QUESTION, "-a", runs["chat"]) == judged(base, runs["chat"], chat_ids(base, user(QUESTION)))
    system = {"role": "system", "content": "Names."}
    ids = chat_ids(base, system, user(QUESTION), template=PLAIN)
    assert said(capsys, QUESTION, "-a", runs["plain"]) == judged(base, runs["plain"], ids)
    ids = plain_ids(base, "3 + 1 =")
    assert said(capsys, "3 + 1 =", "-a", runs["completion"]) == judged(base, runs["completion"], ids)


def test_options_come_before_what_the_adapter_says(runs, base, capsys):
    ids = chat_ids(base, user(QUESTION), template=PLAIN)
    assert said(capsys, QUESTION, "-a", runs["plain"], "--system", "") == judged(base, runs["plain"], ids)
    ids = chat_ids(base, {"role": "system", "content": "Else."}, user(QUESTION))
    options = ("--system", "Else.", "--chat-template", base)
    assert said(capsys, QUESTION, "-a", runs["plain"], *options) == judged(base, runs["plain"], ids)
    ids = chat_ids(base, user("3 + 1 ="))
    assert said(capsys, "3 + 1 =", "-a", runs["completion"], "--chat") == judged(base, runs["completion"], ids)
    assert said(capsys, QUESTION, "-a", runs["chat"], "--raw") == judged(base, runs["chat"], plain_ids(base, QUESTION))


def test_the_terminal_says_that_a_prompt_is_continued(runs, capsys):
    assert reparam("generate", "3 + 1 =", "-a", runs["completion"], "--max-new-tokens", 1) == 0
    assert "was trained on completions, so the prompt is continued as it is" in capsys.readouterr().err
    assert reparam("generate", "3 + 1 =", "-a", runs["completion"], "--max-new-tokens", 1, "--raw") == 0
    assert "was trained on" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
        {"temperature": 1.5},
        {"top_p": 0.5},
        {"top_k": 3, "repetition_penalty": 1.3},
    ],
)
def test_samples_are_those_of_transformers_with_the_same_seed(runs, base, capsys, given):
    options = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
    ids = chat_ids(base, user(QUESTION))
    before = torch.get_rng_state()
    for seed in (0, 7):
        expected = judged(base, runs["chat"], ids, do_sample=True, seed=seed, **given)
        torch.set_rng_state(before)
        assert said(capsys, QUESTION, "-a", runs["chat"], *options, "--seed", seed) == expected
        assert torch.equal(torch.get_rng_state(), before)


def test_a_penalty_alone_stays_greedy_and_temperature_zero_is_greedy(runs, base, capsys):
    ids = chat_ids(base, user(QUESTION))
    greedy = judged(base, runs["chat"], ids)
    assert said(capsys, QUESTION, "-a", runs["chat"], "--temperature", 0, "--top-p", 0.5) == greedy
    penalized = judged(base, runs["chat"], ids, repetition_penalty=1.8)
    assert penalized != greedy
    assert said(capsys, QUESTION, "-a", runs["chat"], "--repetition-penalty", 1.8) == penalized


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"repetition_penalty": 0}, {"seed": -1}]
)
def test_values_out_of_range(wrong, capsys):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*: expected"):
        Sampling(**wrong)
    ((name, value),) = wrong.items()
    assert reparam("generate", "x", "--base", "nowhere", f"--{name.replace('_', '-')}={value}") == 2
    assert f"{name}=" in capsys.readouterr().err


def test_a_file_of_prompts_is_answered_in_order(runs, base, tmp_path, capsys):
    rows = [
        {"prompt": QUESTION, "id": 1},
        {"messages": [user("def g(x):"), {"role": "assistant", "content": "x"}], "kind": "é"},
        {"conversations": [{"from": "human", "value": "def h(y, z=2):"}]},
        {"instruction": "def k():"},
        {"prompt": [user("def m(n):")], "tools": []},
        {"prompt": "1 + 1 =", "completion": " 2"},
        {"text": "import os"},
    ]
    file, output = tmp_path / "prompts.jsonl", tmp_path / "deep" / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = [chat_ids(base, user(text)) for text in (QUESTION, "def g(x):", "def h(y, z=2):", "def k():", "def m(n):")]
    ids += [plain_ids(base, "1 + 1 ="), plain_ids(base, "import os")]
    expected = [judged(base, runs["chat"], each) for each in ids]
    for size in (1, 3, 16):
        options = (
            "--prompts",
            file,
            "-o",
            output,
            "--batch-size",
            size,
            "--max-new-tokens",
            8,
            "--overwrite_output_dir",
        )
        assert reparam("generate", "-a", runs["chat"], *options) == 0
        found = [json.loads(line) for line in output.read_text().splitlines()]
        assert [row["answer"] for row in found] == expected
    assert found[0] == {"id": 1, "prompt": QUESTION, "answer": expected[0]}
    assert found[1] == {"kind": "é", "messages": [user("def g(x):")], "expected": "x", "answer": expected[1]}
    assert found[5]["expected"] == " 2"
    assert "é" in output.read_text()
    capsys.readouterr()
    assert reparam("generate", "-a", runs["chat"], "--prompts", file, "--max-new-tokens", 8) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found


def test_several_adapters_answer_side_by_side_as_each_one_alone(runs, base, tmp_path, capsys):
    """Those with one template are in one batch; each prompt is made as its adapter was trained."""
    file, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    questions = [QUESTION, "def longer(name, other, third=None):"]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))
    given = [part for name in runs for part in ("-a", runs[name])]
    assert reparam("generate", *given, "--compare", "--prompts", file, "-o", output, "--max-new-tokens", 8) == 0
    found = [json.loads(line)["answers"] for line in output.read_text().splitlines()]
    system = {"role": "system", "content": "Names."}
    for text, answers in zip(questions, found, strict=True):
        assert answers == {
            "base": judged(base, None, chat_ids(base, user(text))),
            str(runs["chat"]): judged(base, runs["chat"], chat_ids(base, user(text))),
            str(runs["plain"]): judged(base, runs["plain"], chat_ids(base, system, user(text), template=PLAIN)),
            str(runs["completion"]): judged(base, runs["completion"], plain_ids(base, text)),
        }
    capsys.readouterr()
    assert reparam("generate", QUESTION, *given, "--max-new-tokens", 8) == 0
    assert "│" in capsys.readouterr().out


def test_adapters_that_cannot_be_mixed_answer_one_after_the_other(runs, base, rows, tmp_path, capsys):
    assert train(base, rows, tmp_path / "b", "--method", "bottleneck", "--adapter.targets", "mlp") == 0
    file, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"prompt": QUESTION}))
    both = ("-a", tmp_path / "b", "-a", runs["chat"])
    assert reparam("generate", *both, "--prompts", file, "-o", output, "--max-new-tokens", 8) == 0
    answers = json.loads(output.read_text())["answers"]
    ids = chat_ids(base, user(QUESTION))
    assert answers == {str(each): judged(base, each, ids) for each in (tmp_path / "b", runs["chat"])}


def test_mistakes_in_one_sentence_before_the_model_is_loaded(runs, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"question": "b"}\n{"messages": [{"role": "assistant", "content": "x"}]}\n')
    (tmp_path / "there.jsonl").write_text("kept")
    chat, completion = runs["chat"], runs["completion"]
    for arguments, sentence in (
        (("--prompts", file, "-a", chat), f"{file}:2: expected "),
        (("--prompts", file, "-a", chat), f"{file}:3: nothing stands before the answer"),
        (("--prompts", file, "-a", chat, "-o", tmp_path), "is a folder"),
        (("--prompts", file, "-a", chat, "-o", tmp_path / "there.jsonl"), "exists; give a new file"),
        (("x", "--prompts", file), "leave one out"),
        (("x", "-o", tmp_path / "o"), "--output is for --prompts; add it"),
        (("x", "-a", chat, "-a", chat), "is given twice"),
        (("x", "-a", chat, "-a", completion, "--task", "t"), "--task is for one adapter"),
    ):
        assert reparam("generate", *arguments) == 2
        assert sentence in capsys.readouterr().err
    assert (tmp_path / "there.jsonl").read_text() == "kept"


def test_settings_of_chats_without_effect_are_refused(runs, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"messages": [user("a")]}))
    for arguments, sentence in (
        (("x", "-a", runs["completion"], "--system", "s"), "or pass --chat"),
        (("x", "-a", runs["chat"], "--raw", "--system", "s"), "--system: prompts are continued as plain text"),
        (("x", "-a", runs["chat"], "--no-thinking"), "--thinking: nothing in the chat template depends on it"),
        (("x", "-a", runs["chat"], "--chat-template", "chatml"), "would not stop"),
        (("--prompts", file, "-a", runs["completion"]), f"{file}:1: is a chat"),
    ):
        assert reparam("generate", *arguments) == 2
        assert sentence in capsys.readouterr().err


def test_columns_of_a_file_of_prompts(runs, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"q": "a", "id": 4}')
    options = ("--prompts", file, "--columns", "prompt=q", "--max-new-tokens", 1)
    assert reparam("generate", "-a", runs["chat"], *options) == 0
    assert json.loads(capsys.readouterr().out)["id"] == 4


def test_the_library_mixes_adapters_in_one_call(runs, base):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    load(model, runs["chat"], name="a")
    load(model, runs["plain"], name="b")
    prompts = [chat_ids(base, user(text)) for text in (QUESTION, "def other(n):", "def g():")]
    found = complete(model, tokenizer, prompts, adapters=["b", None, "a"], max_new_tokens=8)
    assert found == [judged(base, f, ids) for f, ids in zip((runs["plain"], None, runs["chat"]), prompts, strict=True)]
