"""Figures about rows, compared with counts by hand and with the tokenizer's own lengths."""

from __future__ import annotations

import math

import pytest
from chat_tokenizers import make

from reparam.data import study
from reparam.data.encode import encode_all
from reparam.data.row import Row
from reparam.errors import DataError

LONG = 2**31 - 1


def chat(source: str, *contents: str, **variables) -> Row:
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": content} for i, content in enumerate(contents))
    return Row("chat", source, messages=messages, variables=variables)


def test_lengths_are_those_of_the_tokenizer():
    tokenizer = make()
    rows = [chat(f"f:{n}", "what is the name", "x " * n) for n in range(1, 150)]
    sizes = sorted(len(tokenizer.apply_chat_template(list(row.messages))["input_ids"]) for row in rows)
    for corpus in (encode_all(rows, tokenizer, max_length=size) for size in (LONG, 100)):
        found = study.lengths(corpus.arrays["tokens"])
        assert (found.shortest, found.longest, found.median) == (sizes[0], sizes[-1], sizes[74])
        assert math.isclose(found.mean, sum(sizes) / len(sizes))
        for bar in found.histogram:
            assert bar.rows == sum(bar.shortest <= size <= bar.longest for size in sizes)
        assert sum(bar.rows for bar in found.histogram) == len(sizes)


def test_what_would_be_cut_is_what_training_cuts_and_refuses():
    tokenizer = make()
    rows = [chat(f"f:{n}", "a " * n, "b " * 3) for n in (2, 10, 20)]
    whole = encode_all(rows, tokenizer, max_length=LONG)
    sizes = whole.arrays["tokens"].tolist()
    last = study.would_cut(whole, sizes[2] - 2)
    assert (last.longer, last.lose_loss, last.lose_answer, last.first) == (1, 1, 0, ("f:20",))
    limited = encode_all(rows, tokenizer, max_length=sizes[2] - 2)
    assert limited.part().report.truncated == 1
    assert study.cut(limited) == last
    most = study.would_cut(whole, sizes[0])
    assert (most.longer, most.lose_loss, most.lose_answer, most.share) == (2, 2, 2, 2 / 3)
    assert study.cut(encode_all(rows, tokenizer, max_length=sizes[0], too_long="truncate")) == most
    with pytest.raises(DataError, match="cuts off the whole answer of 2 rows"):
        encode_all(rows, tokenizer, max_length=sizes[0])
    assert study.would_cut(whole, sizes[2]).longer == 0
    assert study.cut(encode_all(rows, tokenizer, max_length=sizes[0], too_long="split")).lose_loss == 0


def test_texts_lose_nothing():
    rows = [Row("text", "f:1", text="what is the name " * 20)]
    whole, limited = (encode_all(rows, make(), max_length=size) for size in (LONG, 10))
    assert study.would_cut(whole, 10) == study.cut(limited)
    assert (study.cut(limited).longer, study.cut(limited).lose_loss) == (1, 0)


def test_rows_that_repeat_others_and_rows_that_stand_in_the_held_out_ones():
    rows = [chat("a:1", "q", "x"), chat("a:2", "q", "y"), chat("a:3", " q ", "x"), chat("a:4", "r", "x")]
    rows += [Row("completion", "a:5", prompt="q", completion="x")]
    assert study.repeats(study.survey(rows)[1]) == [("a:3", "a:1")]
    held_out = [chat("b:1", "q", "x"), chat("b:2", "s", "x"), Row("completion", "b:3", prompt="q", completion="z")]
    same, alike = study.shared(study.survey(rows)[1], study.survey(held_out)[1])
    assert same == [("a:1", "b:1"), ("a:3", "b:1")]
    assert alike == [("a:2", "b:1"), ("a:5", "b:3")]


def test_the_boundary_between_question_and_answer_counts():
    a, b = (
        Row("completion", f"a:{n}", prompt=p, completion=c) for n, (p, c) in enumerate((("x y", "z"), ("x", "y z")))
    )
    assert study.repeats(study.survey([a, b])[1]) == []


def test_calls_and_reasoning_tell_rows_apart():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}
    other = {**call, "tool_calls": [{"name": "f", "arguments": {"a": 2}}]}
    thought = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    ask = {"role": "user", "content": "q"}
    rows = [Row("chat", f"a:{n}", messages=(ask, each)) for n, each in enumerate((call, other, thought, dict(call)))]
    assert study.repeats(study.survey(rows)[1]) == [("a:3", "a:0")]
    assert study.survey(rows)[0].tool_calls == 3
    assert study.survey(rows)[0].with_reasoning == 1
