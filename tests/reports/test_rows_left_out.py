"""Rows that are too long or cannot be used: refused, cut, split or left out by choice, counted, and named."""

from __future__ import annotations

import json
from pathlib import Path

import chat_tokenizers as kit
import pytest
from command import reparam, train

from reparam.data.batches import IGNORED, Encoded
from reparam.data.encode import encode
from reparam.data.row import Row
from reparam.data.rows import Reading
from reparam.errors import DataError

TOKENIZER = kit.make()


def completion(prompt: str, answer: str, line: int) -> Row:
    return Row("completion", f"f.jsonl:{line}", prompt=prompt, completion=answer)


def chat(question: str, answer: str, line: int) -> Row:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Row("chat", f"f.jsonl:{line}", messages=messages)


def text(content: str, line: int) -> Row:
    return Row("text", f"f.jsonl:{line}", text=content)


def shown(encoded: Encoded) -> list[tuple[str, str]]:
    """The tokens of each example, and those with loss. Every letter is a token."""
    return [
        (TOKENIZER.decode(example["input_ids"]), TOKENIZER.decode(example["labels"][example["labels"] != IGNORED]))
        for example in encoded
    ]


# With their end tokens: 4 + 5 + 1, 9 + 2 + 1 and 2 + 1 + 1 tokens.
COMPLETIONS = [completion("abab", "cdefg", 1), completion("ababababa", "cd", 2), completion("ab", "c", 3)]


@pytest.mark.parametrize(
    ("too_long", "expected", "told"),
    [
        ("drop", [("abc<|end|>", "c<|end|>")], "is too short, so these are left out (2 rows: f.jsonl:1 (10 tokens), "),
        (
            "truncate",
            [("ababcd", "cd"), ("abc<|end|>", "c<|end|>")],
            "is too short, so these are left out (1 row: f.jsonl:2 (12 tokens))",
        ),
        (
            "split",
            # the first six tokens of the second row carry no loss
            [("ababcd", "cd"), ("efg<|end|>", "fg<|end|>"), ("abacd<|end|>", "cd<|end|>"), ("abc<|end|>", "c<|end|>")],
            "",
        ),
    ],
)
def test_each_choice_for_completions(too_long: str, expected: list[tuple[str, str]], told: str) -> None:
    encoded = encode(COMPLETIONS, TOKENIZER, max_length=6, too_long=too_long)
    assert shown(encoded) == expected
    assert told in " ".join(encoded.report.warnings)


def test_each_choice_for_texts() -> None:
    rows = [text("abcdefgh", 1), text("ab", 2)]  # 9 and 3 tokens
    sizes = {
        choice: [len(example["input_ids"]) for example in encode(rows, TOKENIZER, max_length=4, too_long=choice)]
        for choice in ("auto", "split", "truncate", "drop")
    }
    assert sizes == {"auto": [4, 3, 2, 3], "split": [4, 3, 2, 3], "truncate": [4, 3], "drop": [3]}
    with pytest.raises(DataError, match=r"max_length=4 is too short for 1 row: f.jsonl:1 \(9 tokens\)"):
        encode(rows, TOKENIZER, max_length=4, too_long="error")


def test_pieces_of_a_chat_hold_all_its_loss() -> None:
    row = chat("abab", "cdefgcdefg", 1)
    whole = encode([row], TOKENIZER, max_length=100)
    pieces = encode([row], TOKENIZER, max_length=9, too_long="split")
    assert [len(piece["input_ids"]) for piece in pieces] == [9, 9]
    ids = [token for piece in pieces for token in piece["input_ids"].tolist()]
    assert ids == whole[0]["input_ids"].tolist()
    assert whole.report.loss_tokens - pieces.report.loss_tokens == 1  # the first token of the second piece
    assert pieces.report.split == 1


def test_what_loses_only_tokens_without_loss_is_not_too_long() -> None:
    tokenizer = kit.make(kit.CHATML)  # a newline without loss ends each turn
    length = len(encode([chat("a", "b", 1)], tokenizer, max_length=100)[0]["input_ids"])
    for choice in ("error", "drop", "truncate", "split"):
        encoded = encode([chat("a", "b", 1)], tokenizer, max_length=length - 1, too_long=choice)
        assert (len(encoded[0]["input_ids"]), encoded.report.warnings) == (length - 1, ())


def test_three_rows_are_shown_with_their_lengths_and_all_are_counted() -> None:
    rows = [completion("a" * 5, "b" * (10 + i), i) for i in range(1, 6)] + [completion("a", "b", 6)]
    report = encode(rows, TOKENIZER, max_length=8, too_long="drop").report
    assert report.warnings == (
        "max_length=8 is too short, so these are left out (5 rows: f.jsonl:1 (17 tokens), f.jsonl:2 (18 tokens), "
        "f.jsonl:3 (19 tokens), ...)",
    )
    assert (report.rows, report.dropped, report.examples) == (1, 5, 1)
    assert "5 rows left out" in str(report)


def test_when_all_rows_are_left_out_that_is_the_error() -> None:
    with pytest.raises(DataError, match="no rows are left: max_length=8 is too short"):
        encode([completion("a" * 9, "b", 1)], TOKENIZER, max_length=8, too_long="drop")


def test_bad_rows_are_left_out_counted_and_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b"})
    file.write_text("\n".join([good, "{broken", good, '{"prompt": 3, "completion": "b"}', "[1]", "{}", good]))
    reading = Reading([file], bad_rows="drop")
    assert [row.source for row in reading] == [f"{file}:{line}" for line in (1, 3, 7)]
    (note,) = reading.notes()
    assert note.startswith(f"4 rows cannot be trained on, so they are left out: {file}:2:2: malformed JSON")
    assert f'{file}:4: "prompt" must be a string' in note
    assert note.endswith(f"{file}:5: expected an object, got a list, ...")
    with pytest.raises(DataError) as caught:
        list(Reading([file]))
    assert len(caught.value.problems) == 4


def test_rows_that_the_template_refuses_are_left_out() -> None:
    rows = [
        chat("a", "b", 1),
        Row("chat", "f.jsonl:2", messages=({"role": "tool", "content": "x"},)),
        Row("chat", "f.jsonl:3", messages=({"role": "user", "content": "x"},)),
    ]
    encoded = encode(rows, TOKENIZER, max_length=50, bad_rows="drop")
    assert encoded.sources == ["f.jsonl:1"]
    (warning,) = encoded.report.warnings
    assert warning.startswith("2 rows cannot be trained on, so they are left out: f.jsonl:2: the chat template refuses")
    assert "f.jsonl:3: no token carries loss" in warning


def test_a_file_that_cannot_be_read_is_an_error_nevertheless(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('prompt,completion\na,b\n"a,b\n')
    with pytest.raises(DataError, match="malformed table"):
        list(Reading([file], bad_rows="drop"))


def test_nothing_but_bad_rows_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{broken\n")
    with pytest.raises(DataError, match="no rows are left: 1 row cannot be trained on"):
        list(Reading([file], bad_rows="drop"))


def test_from_the_command_line(base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Path(rows).read_text().splitlines()
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*lines, "{broken", json.dumps({"prompt": "x " * 3000, "completion": "y"})]) + "\n")
    assert train(base, str(file), tmp_path / "out") == 2
    assert f"{file}:{len(lines) + 1}:2: malformed JSON" in capsys.readouterr().err
    assert train(base, str(file), tmp_path / "out", "--data.bad_rows", "drop") == 2
    said = capsys.readouterr().err
    assert "cuts off the whole answer of 1 row" in said
    assert "--data.too_long drop leaves them out" in said
    assert not (tmp_path / "out").exists()
    choices = ("--data.bad_rows", "drop", "--data.too_long", "drop")
    assert train(base, str(file), tmp_path / "out", *choices) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 row cannot be trained on, so they are left out" in said
    assert "is too short, so these are left out (1 row" in said
    assert reparam("train", "--base.path", base, "--data.too_long", "shorten", "--data.train", file) == 2
    assert "data.too_long" in capsys.readouterr().err
