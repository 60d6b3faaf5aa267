"""Preferences in the forms that data sets have, and what is said about rows of another form."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command import reparam
from transformers import AutoTokenizer

from reparam.data.formats.preference import read_judged, read_pair
from reparam.data.preferences import encode_preferences, read_answers, read_pairs
from reparam.data.row import Row
from reparam.errors import DataError

ASK = {"role": "user", "content": "2 + 2 ="}
YES, NO = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
LONG = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
]
CHATS: dict[str, dict[str, Any]] = {
    "messages": {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
    "one message each": {"prompt": [ASK], "chosen": YES, "rejected": NO},
    "answers as text": {"prompt": [ASK], "chosen": "4", "rejected": "5"},
    "implicit": {"chosen": [ASK, YES], "rejected": [ASK, NO]},
    "UltraFeedback": {"prompt": "2 + 2 =", "chosen": [ASK, YES], "rejected": [ASK, NO], "score_chosen": 8.5},
    "prompt as text": {"prompt": "2 + 2 =", "chosen": [YES], "rejected": [NO]},
    "as JSON": {"prompt": json.dumps([ASK]), "chosen": json.dumps([YES]), "rejected": json.dumps([NO])},
    "Alpaca": {"instruction": "2 + 2 =", "input": "", "chosen": "4", "rejected": "5"},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "2 + 2 ="}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    },
    "messages and answers": {"messages": [ASK], "chosen": YES, "rejected": NO},
    "OpenAI": {"input": {"messages": [ASK]}, "preferred_output": [YES], "non_preferred_output": [NO]},
}


def plain(row: Row) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in row.messages]


@pytest.mark.parametrize("form", CHATS)
def test_a_form_of_chats(form: str) -> None:
    chosen, rejected = read_pair(CHATS[form], "a.jsonl:3")
    assert plain(chosen) == [("user", "2 + 2 ="), ("assistant", "4")]
    assert plain(rejected) == [("user", "2 + 2 ="), ("assistant", "5")]
    assert (chosen.source, rejected.source) == ("a.jsonl:3 (chosen)", "a.jsonl:3 (rejected)")
    assert read_judged(CHATS[form], "a.jsonl:3") == [(chosen, True), (rejected, False)]


def test_texts() -> None:
    chosen, rejected = read_pair({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, "a:1")
    assert [(row.prompt, row.completion) for row in (chosen, rejected)] == [("2 + 2 =", " 4"), ("2 + 2 =", " 5")]
    # As in TRL: a space belongs to the word after it.
    chosen, rejected = read_pair({"chosen": "Q: a? A: yes it is", "rejected": "Q: a? A: no"}, "a:1")
    assert [(row.prompt, row.completion) for row in (chosen, rejected)] == [
        ("Q: a? A:", " yes it is"),
        ("Q: a? A:", " no"),
    ]
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    row = {"question": "2 + 2 =", "good": " 4", "bad": " 5", "prompt": "unused"}
    assert [row.completion for row in read_pair(row, "a:1", columns)] == [" 4", " 5"]


def test_only_the_answers_that_differ_carry_loss(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "assets" / "tiny-python")
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"chosen": [*LONG, ASK, YES], "rejected": [*LONG, ASK, NO]}) + "\n")
    found = encode_preferences(read_pairs(file), tokenizer, max_length=200)
    assert (len(found), found.paired, found.good.tolist()) == (1, True, [True, False])
    assert found.sources == [f"{file}:1"]
    for index, answer in enumerate(("4", "5")):
        example = found.encoded[index]
        compared = example["input_ids"][example["labels"] != -100]
        assert tokenizer.decode(compared).startswith(answer)
        assert "Ho" not in tokenizer.decode(compared)


@pytest.mark.parametrize(("label", "good"), [(True, True), (0, False), ("True", True), ("0", False)])
def test_labels(label: object, good: bool) -> None:
    [(row, found)] = read_judged({"messages": [ASK, YES], "label": label}, "a:1")
    assert (plain(row)[-1], found, row.columns) == (("assistant", "4"), good, {})
    assert read_judged({"messages": [ASK, YES], "kto_tag": label}, "a:1")[0][1] == good


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a", "chosen": " b"}, '"rejected" is missing'),
    ({"prompt": "a", "chosen": " b", "rejectd": " c"}, 'did you mean "rejected" instead of "rejectd"?'),
    ({"prompt": "a", "chosen": " b", "rejected": " b"}, "are the same, so the row prefers nothing"),
    ({"prompt": "a", "chosen": " b", "rejected": 5}, '"answer" must be a string'),
    ({"chosen": "yes", "rejected": "no"}, 'no "prompt"'),
    ({"chosen": [YES], "rejected": [NO]}, "begin with different messages"),
    ({"chosen": [ASK, YES], "rejected": [ASK]}, "do not both end with an answer of their own"),
    ({"prompt": "a", "completion": " b", "label": True}, "--objective kto"),
    ({"messages": [ASK, YES]}, 'expected "chosen" and "rejected"; the row has "messages"'),
    ({"prompt": [ASK], "chosen": [{"role": "bot", "content": "4"}], "rejected": [NO]}, "unknown role 'bot'"),
]


@pytest.mark.parametrize(("row", "said"), FAULTS)
def test_what_is_said_about_another_form(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as error:
        read_pair(row, "a.jsonl:7")
    assert said in str(error.value)
    assert "a.jsonl:7" in str(error.value)


def test_what_is_said_about_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match='"label" must be true or false, got 2'):
        read_judged({"messages": [ASK, YES], "label": 2}, "a:1")
    with pytest.raises(DataError, match='expected an answer with "label"'):
        read_judged({"messages": [ASK, YES]}, "a:1")
    file = tmp_path / "a.jsonl"
    file.write_text(
        "\n".join(json.dumps({"prompt": "a", "completion": "b", "label": x}) for x in (True, "maybe", False))
    )
    with pytest.raises(DataError, match=r"a.jsonl:2: .label. must be true or false, got 'maybe'"):
        read_answers(file)


def test_mistakes_on_the_command_line(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is one sentence and code 2, before anything is written."""
    pairs, judged, answers = (tmp_path / f"{name}.jsonl" for name in ("pairs", "judged", "answers"))
    pairs.write_text(json.dumps({"prompt": [ASK], "chosen": [YES], "rejected": [NO]}) + "\n")
    judged.write_text(
        "".join(json.dumps({"prompt": "a", "completion": f"b{i}", "label": True}) + "\n" for i in range(4))
    )
    answers.write_text(json.dumps({"messages": [ASK, YES]}) + "\n")
    for more, said in (
        (["--data.train", answers, "--objective", "dpo"], '"chosen" and "rejected"'),
        (["--data.train", pairs], "train on preferences with --objective dpo, orpo or kto"),
        (["--data.train", judged, "--objective", "dpo"], "--objective kto"),
        (["--data.train", judged, "--objective", "kto"], "all 4 answers are good; kto needs both good and bad ones"),
        (["--data.train", pairs, "--objective", "kto", "--batch_size", 1], "run.batch_size: kto compares the rows"),
        (["--data.train", pairs, "--objective", "pdo"], "run.objective"),
        (
            ["--data.train", pairs, "--objective", "dpo", "--beta", 0],
            "optim.beta: 0.0: expected a finite number above 0",
        ),
        (["--data.train", answers, "--beta", 0.1], "optim.beta: the objective sft does not use it"),
        (["--data.train", pairs, "--objective", "orpo", "--loss_type", "ipo"], "prefer.loss_type: the objective orpo"),
        (["--data.train", pairs, "--objective", "dpo", "--data.loss_on", "all"], "data.loss_on: dpo compares answers"),
        (
            ["--data.train", pairs, "--objective", "dpo", "--prefer.label_smoothing", 0.1],
            "the loss sigmoid does not use",
        ),
    ):
        assert reparam("train", "--base.path", base, "-o", tmp_path / "out", *more) == 2, more
        error = " ".join(capsys.readouterr().err.split())
        assert said in error, error
        assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_without_trl(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(("trl", "reparam.train.objectives.dpo"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(json.dumps({"prompt": [ASK], "chosen": [YES], "rejected": [NO]}) + "\n")
    command = ["train", "--base.path", base, "--data.train", rows, "--objective", "dpo", "-o", tmp_path / "out"]
    assert reparam(*command) == 2
    assert "pip install 'reparam[prefer]'" in " ".join(capsys.readouterr().err.split())
