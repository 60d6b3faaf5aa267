"""The formats of rows that other tools read."""

from __future__ import annotations

import json

import pytest

from reparam.data.formats import FORMATS, read_row
from reparam.errors import DataError

QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def messages(value: dict, **columns) -> list[dict]:
    row = read_row(value, "f:1", columns)
    assert row.kind == "chat"
    return [dict(message) for message in row.messages]


def test_examples_of_the_formats_read():
    kinds = [read_row(json.loads(each.example), "f:1").kind for each in FORMATS]
    assert kinds == ["chat", "chat", "completion", "chat", "text"]


def test_rows_are_the_same_after_writing_them_as_json():
    values = [
        {"messages": [QUESTION, {**ANSWER, "weight": 0}], "tools": [{"name": "f"}], "id": 3},
        {"prompt": "p", "completion": "c", "task": "t"},
        {"text": "t"},
    ]
    for value in values:
        row = read_row(value, "f:1")
        assert read_row(json.loads(json.dumps(row.as_json())), "f:1") == row


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [QUESTION, ANSWER]},
        {"messages": json.dumps([QUESTION, ANSWER])},
        {"messages": [{**QUESTION, "name": None}, {**ANSWER, "tool_calls": None}], "prompt": "q"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [QUESTION, ANSWER]},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "output": "a"},
        {"prompt": [QUESTION], "completion": [ANSWER]},
    ],
)
def test_chats_of_every_format(value):
    assert messages(value) == [QUESTION, ANSWER]


def test_tools_in_every_format():
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    expected = [QUESTION, called, {"role": "tool", "content": "1"}, ANSWER]
    openai = [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}, expected[2], ANSWER]
    assert messages({"messages": openai}) == expected
    older = [QUESTION, {"role": "assistant", "content": None, "function_call": CALL["function"]}]
    older += [{"role": "function", "content": "1"}, ANSWER]
    assert messages({"messages": older}) == expected
    sharegpt = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "a"},
    ]
    row = read_row({"conversations": sharegpt, "tools": '[{"name": "f"}]', "system": ""}, "f:1")
    assert [dict(message) for message in row.messages] == expected
    assert row.variables == {"tools": [{"name": "f"}]}


def test_alpaca_with_input_system_and_history():
    value = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q0", "a0"]]}
    assert messages(value) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q0"},
        {"role": "assistant", "content": "a0"},
        {"role": "user", "content": "q\ni"},
        ANSWER,
    ]


def test_answers_in_a_prompt_carry_no_loss():
    found = messages({"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]})
    assert found == [QUESTION, {**ANSWER, "train": False}, QUESTION, ANSWER]


def test_columns_say_where_the_keys_are():
    value = {"question": "q", "answer": "a", "text": "t", "messages": "m"}
    row = read_row(value, "f:1", {"prompt": "question", "completion": "answer"})
    assert (row.kind, row.prompt, row.completion) == ("completion", "q", "a")
    assert read_row(value, "f:1", {"text": "text"}).text == "t"
    assert messages({"dialog": [QUESTION, ANSWER]}, messages="dialog") == [QUESTION, ANSWER]
    with pytest.raises(DataError, match=r'f:1: no "quest", which data\.columns names; did you mean'):
        read_row({"questn": "q", "answer": "a"}, "f:1", {"prompt": "quest", "completion": "answer"})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"conversations": [{"from": "alien", "value": "q"}]}, "message 1 has the unknown role 'alien'"),
        (
            {"conversations": [{"from": "function_call", "value": "f()"}]},
            'must be an object with "name" and "arguments"',
        ),
        ({"instruction": 3, "output": "a"}, '"instruction" must be a string, got a number'),
        ({"instruction": "q", "output": "a", "history": "x"}, '"history" must be a list of pairs'),
        ({"prompt": [QUESTION], "completion": "a"}, "must both be strings, or both lists of messages"),
        ({"messages": [QUESTION, ANSWER], "text": "t"}, 'several formats in one row ("messages", "text"); keep one'),
    ],
)
def test_refused(value, expected):
    with pytest.raises(DataError) as caught:
        read_row(value, "f:1")
    assert caught.value.problems[0].startswith("f:1: ")
    assert expected in caught.value.problems[0]
