"""Encoding of completions and texts, lengths, byte counts, and what is refused."""

from __future__ import annotations

import chat_tokenizers as kit
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from reparam.data.batches import IGNORED, Encoded
from reparam.data.encode import BATCH, encode
from reparam.data.row import Row
from reparam.errors import DataError


def completion(prompt: str, answer: str, line: int = 1) -> Row:
    return Row("completion", f"f.jsonl:{line}", prompt=prompt, completion=answer)


def text(content: str, line: int = 1) -> Row:
    return Row("text", f"f.jsonl:{line}", text=content)


def chat(question: str, answer: str, line: int = 1) -> Row:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Row("chat", f"f.jsonl:{line}", messages=messages)


def with_loss(encoded: Encoded, tokenizer: PreTrainedTokenizerFast, index: int = 0) -> str:
    labels = encoded[index]["labels"]
    return tokenizer.decode(labels[labels != IGNORED])


def problems(rows: list[Row], tokenizer: PreTrainedTokenizerFast, **options) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        encode(rows, tokenizer, **{"max_length": 500, **options})
    return caught.value.problems


def spelled_bytes(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> int:
    """The number of bytes of tokens: in a byte-level vocabulary each character is one byte."""
    special = set(tokenizer.added_tokens_decoder)
    return sum(len(tokenizer.convert_ids_to_tokens(i)) for i in ids if i not in special)


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).filter(lambda t: "<|" not in t)
some_text = any_text.filter(bool)

# --- completions ---


@settings(deadline=None)
@given(prompt=any_text, answer=some_text, adds_bos=st.booleans())
def test_completion_and_end_carry_loss_and_the_prompt_is_as_generation_sees_it(prompt, answer, adds_bos):
    tokenizer = kit.make(adds_bos=adds_bos)
    encoded = encode([completion("x" + prompt, answer)], tokenizer, max_length=500)
    assert with_loss(encoded, tokenizer) == answer + kit.END
    example = encoded[0]
    carries = example["labels"] != IGNORED
    assert torch.equal(example["input_ids"][carries], example["labels"][carries])
    assert example["input_ids"][~carries].tolist() == tokenizer("x" + prompt)["input_ids"]


def test_no_token_spans_prompt_and_completion():
    tokenizer = kit.make()
    assert "::" in tokenizer.tokenize("a::b")  # the premise
    ids = encode([completion("a:", ":b")], tokenizer, max_length=500)[0]["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", ":", ":", "b", kit.END]


def test_completion_with_loss_on_all():
    example = encode([completion("the name", "b")], kit.make(), max_length=500, loss_on="all")[0]
    assert example["labels"].tolist() == [IGNORED, *example["input_ids"][1:].tolist()]


def test_chats_and_completions_keep_their_order_over_many_batches():
    rows = [(chat if i % 3 else completion)("q", str(i), i) for i in range(BATCH + 50)]
    tokenizer = kit.make()
    encoded = encode(rows, tokenizer, max_length=50)
    assert encoded.sources == [row.source for row in rows]
    for i in (0, 1, 2, BATCH - 1, BATCH, BATCH + 49):
        assert with_loss(encoded, tokenizer, i) == f"{i}{kit.END}"


# --- texts ---


@settings(deadline=None)
@given(contents=st.lists(some_text, min_size=1, max_size=4), max_length=st.integers(3, 20), adds_bos=st.booleans())
def test_pieces_are_the_text_and_all_but_their_first_tokens_carry_loss(contents, max_length, adds_bos):
    tokenizer = kit.make(adds_bos=adds_bos)
    rows = [text(content, line) for line, content in enumerate(contents, start=1)]
    encoded = encode(rows, tokenizer, max_length=max_length)
    whole = [[*tokenizer(content)["input_ids"], tokenizer.eos_token_id] for content in contents]
    for row, ids in zip(rows, whole, strict=True):
        pieces = [encoded[i] for i, source in enumerate(encoded.sources) if source == row.source]
        assert [token for piece in pieces for token in piece["input_ids"].tolist()] == ids
        for piece in pieces:
            assert 2 <= len(piece["input_ids"]) <= max_length
            assert piece["labels"].tolist() == [IGNORED, *piece["input_ids"][1:].tolist()]
    report = encoded.report
    assert (report.rows, report.examples) == (len(rows), len(encoded))
    assert report.longest == max(map(len, whole))
    assert report.split == sum(len(ids) > max_length for ids in whole)
    assert report.tokens == sum(map(len, whole))
    assert report.loss_tokens == report.tokens - report.examples
    assert report.truncated == 0


@settings(deadline=None)
@given(content=st.text(st.characters(max_codepoint=127), min_size=1, max_size=60), max_length=st.integers(3, 20))
def test_byte_counts_of_ascii_are_those_of_the_predicted_tokens(content, max_length):
    tokenizer = kit.make()
    encoded = encode([text(content)], tokenizer, max_length=max_length)
    for i in range(len(encoded)):
        assert encoded.text_bytes[i] == spelled_bytes(tokenizer, encoded[i]["input_ids"].tolist()[1:])
    assert encoded.report.text_bytes == encoded.text_bytes.sum()


@settings(deadline=None)
@given(content=some_text, max_length=st.integers(3, 20), adds_bos=st.booleans())
def test_byte_counts_of_any_text(content, max_length, adds_bos):
    tokenizer = kit.make(adds_bos=adds_bos)
    encoded = encode([text(content)], tokenizer, max_length=max_length)
    predicted = [token for example in encoded for token in example["input_ids"].tolist()[1:]]
    # a character of four bytes may be divided between the first token of a piece and the next
    assert abs(encoded.report.text_bytes - spelled_bytes(tokenizer, predicted)) <= 3 * len(encoded)
    whole = encode([text(content)], tokenizer, max_length=500)
    if adds_bos:
        assert whole.report.text_bytes == len(content.encode())


def test_what_the_text_spells_out_is_not_added_again():
    tokenizer = kit.make(adds_bos=True)
    encoded = encode([text(f"{kit.BOS}the name{kit.END}"), completion("a", f"b{kit.END}")], tokenizer, max_length=500)
    for i in range(2):
        ids = encoded[i]["input_ids"].tolist()
        assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (1, 1)
    assert "contains the text of a special token" in encoded.report.warnings[0]


def test_tokenizer_without_end_token_is_reported():
    tokenizer = kit.make(end=None)
    encoded = encode([text("the name", 1), text("a sum", 2)], tokenizer, max_length=500)
    assert encoded[0]["input_ids"].tolist() == tokenizer("the name")["input_ids"]
    (warning,) = encoded.report.warnings
    assert "no end token" in warning
    assert warning.endswith("(2 rows, first f.jsonl:1)")


# --- cutting ---


def test_part_of_an_answer_is_cut_and_counted():
    tokenizer = kit.make()
    rows = [completion("ab", "cdefgh", 1), completion("ab", "c", 2), chat("ab", "cdefgh", 3)]
    encoded = encode(rows, tokenizer, max_length=6)
    assert [with_loss(encoded, tokenizer, i) for i in range(3)] == ["cdef", f"c{kit.END}", "c"]
    assert (encoded.report.truncated, encoded.report.longest) == (2, 12)
    (warning,) = encoded.report.warnings
    assert (
        warning
        == "max_length=6 cuts off tokens that would carry loss (2 rows: f.jsonl:1 (9 tokens), f.jsonl:3 (12 tokens))"
    )


def test_cutting_what_carries_no_loss_is_not_counted():
    tokenizer = kit.make(kit.CHATML)
    row = chat("q", "b")
    length = len(encode([row], tokenizer, max_length=500)[0]["input_ids"])
    encoded = encode([row], tokenizer, max_length=length - 1)  # without the newline behind the end token
    assert with_loss(encoded, tokenizer) == f"b{kit.END}"
    assert (encoded.report.truncated, encoded.report.warnings) == (0, ())


def test_cutting_off_a_whole_answer_names_the_rows_and_the_length_they_need():
    rows = [completion("a" * 3, "b", 1), completion("a" * 9, "b", 2), chat("a" * 15, "bb", 3)]
    (found,) = problems(rows, kit.make(), max_length=9)
    assert found == (
        "max_length=9 cuts off the whole answer of 2 rows: f.jsonl:2 (11 tokens), f.jsonl:3 (21 tokens); "
        "max_length=21 keeps all of them, and --data.too_long drop leaves them out"
    )
    assert encode(rows, kit.make(), max_length=21).report.truncated == 0


@settings(deadline=None)
@given(prompt=st.integers(1, 12), answer=st.integers(0, 12), max_length=st.integers(3, 30))
def test_a_row_is_kept_exactly_if_a_token_of_its_answer_fits(prompt, answer, max_length):
    row = completion("a" * prompt, "b" * answer)
    assert len(kit.make().tokenize("a" * prompt)) == prompt  # the premise: no token of several letters
    if max_length <= prompt:
        assert "cuts off the whole answer" in problems([row], kit.make(), max_length=max_length)[0]
        return
    encoded = encode([row], kit.make(), max_length=max_length)
    assert encoded.report.loss_tokens == min(max_length, prompt + answer + 1) - prompt
    assert encoded.report.truncated == (prompt + answer + 1 > max_length)


# --- refusals ---


def test_rows_in_which_nothing_carries_loss():
    tokenizer = kit.make(end=None)
    found = problems([completion("a", "", 1), completion("a", "b", 2), text("c", 3), completion("", "b", 4)], tokenizer)
    assert [p.split(": ")[0] for p in found] == ["f.jsonl:1", "f.jsonl:3", "f.jsonl:4"]
    assert all("no token carries loss" in p for p in found)


def test_ids_beyond_the_vocabulary_name_token_and_row():
    tokenizer = kit.make()
    size = len(tokenizer)
    encode([completion("q", "b")], tokenizer, max_length=500, vocab_size=size)
    tokenizer.add_tokens(["<extra>", "<more>"])
    rows = [completion("q", "b", 1), completion("<extra>", "b", 2), completion("q", "<extra><more>", 3)]
    found = problems(rows, tokenizer, vocab_size=size)
    assert found[0].startswith(
        f"f.jsonl:2: the token '<extra>' has the id {size}, outside the model's vocabulary of {size} (2 rows)"
    )
    assert found[1].startswith(f"f.jsonl:3: the token '<more>' has the id {size + 1}")
    encode(rows, tokenizer, max_length=500, vocab_size=size + 2)


def test_all_kinds_of_problems_at_once():
    rows = [completion("a" * 90, "b", 1), Row("chat", "f.jsonl:2", messages=({"role": "user", "content": "q"},))]
    found = problems(rows, kit.make(), max_length=50, vocab_size=3)
    assert "cuts off the whole answer" in found[0]
    assert "no message has the role 'assistant'" in found[1]
    assert "outside the model's vocabulary" in found[2]


def test_settings():
    found = problems([], kit.make(), max_length=2, loss_on="answer")
    assert len(found) == 3
    assert "the minimum is 3" in found[1]
    assert "expected 'answers', 'last' or 'all'" in found[2]


# --- the report ---


def test_report_reads_well():
    tokenizer = kit.make()
    encoded = encode([completion("ab", "cdefgh", 1), completion("ab", "c", 2)], tokenizer, max_length=6)
    assert str(encoded.report) == "2 rows; 10 tokens, 6 of them with loss (60%); longest row 9; 1 row truncated"
    pieces = encode([text("abcdefghi")], tokenizer, max_length=4)
    assert str(pieces.report) == (
        "1 row; 10 tokens, 7 of them with loss (70%); longest row 10; 1 row split, 3 examples in all"
    )


def test_keys_that_change_nothing_are_listed():
    messages = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "r"})
    row = Row("chat", "f:1", messages=messages, variables={"tools": [{"name": "f"}]}, columns={"id": 1, "task": "x"})
    report = encode([row], kit.make(), max_length=50).report
    assert str(report).endswith("; not used: id, task, reasoning_content, tools")
    assert "not used: id, reasoning_content, tools" in str(encode([row], kit.make(), max_length=50, tasks=["x"]).report)
    reads_tools = kit.make(kit.MARKED.replace("{% for m in", "{{ tools | tojson }}{% for m in"))
    assert "not used: id, task, reasoning_content" in str(encode([row], reads_tools, max_length=50).report)
    assert "tools" not in str(encode([row], reads_tools, max_length=50).report)


def test_a_key_without_which_the_template_refuses_the_chat_is_used():
    needs = kit.make("{% if not tools %}{{ raise_exception('no tools') }}{% endif %}" + kit.MARKED)
    row = Row("chat", "f:1", messages=({"role": "assistant", "content": "a"},), variables={"tools": [{"name": "f"}]})
    assert "not used" not in str(encode([row], needs, max_length=50).report)
