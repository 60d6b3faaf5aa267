"""Loss masks of chats, under the kinds of chat templates in use."""

from __future__ import annotations

import chat_tokenizers as kit
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from reparam.data.batches import IGNORED, Encoded
from reparam.data.chat import special_tokens
from reparam.data.encode import encode
from reparam.data.pieces import Pieces
from reparam.data.row import Row
from reparam.errors import DataError

ROLES = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}


def chat(*messages: str, line: int = 1) -> Row:
    """A chat from messages such as "u:hello"."""
    split = [message.split(":", 1) for message in messages]
    return Row("chat", f"f.jsonl:{line}", messages=tuple({"role": ROLES[r], "content": c} for r, c in split))


def with_loss(encoded: Encoded, tokenizer, index: int = 0) -> str:
    """The text of the tokens that carry loss."""
    labels = encoded[index]["labels"]
    return tokenizer.decode(labels[labels != IGNORED])


def problems(rows: list[Row], tokenizer, **options) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        encode(rows, tokenizer, max_length=500, **options)
    return caught.value.problems


contents = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda t: "<|" not in t)
turns = st.lists(st.tuples(contents, contents), min_size=1, max_size=3)

# --- answers and their ends ---


@settings(deadline=None)
@given(system=st.none() | contents, turns=turns)
def test_loss_tokens_are_the_answers_and_their_ends(system, turns):
    messages = [] if system is None else [f"s:{system}"]
    messages += [message for question, answer in turns for message in (f"u:{question}", f"a:{answer}")]
    row = chat(*messages)
    for template in (kit.MARKED, kit.MARKED_TWICE, kit.MARKED_WITHOUT_END, kit.UNMARKED, kit.CHATML, kit.ENDS_THE_TEXT):
        tokenizer = kit.make(template)
        encoded = encode([row], tokenizer, max_length=1000)
        assert with_loss(encoded, tokenizer) == "".join(answer + kit.END for _, answer in turns)
        example = encoded[0]
        carries = example["labels"] != IGNORED
        assert (example["labels"][carries] == example["input_ids"][carries]).all()
        ids = tokenizer.apply_chat_template(list(row.messages), return_dict=True)["input_ids"]
        assert example["input_ids"].tolist() == ids


@settings(deadline=None)
@given(turns=turns)
def test_own_search_for_answers_agrees_with_the_markers_of_the_template(turns):
    row = chat(*(message for q, a in turns for message in (f"u:{q}", f"a:{a}")))
    marked, found = (encode([row], kit.make(t), max_length=1000) for t in (kit.MARKED, kit.UNMARKED))
    assert marked.ids.tolist() == found.ids.tolist()
    assert marked.loss.tolist() == found.loss.tolist()


@pytest.mark.parametrize("template", [kit.STRIPS, kit.LLAMA3])
def test_template_that_strips_content(template):
    tokenizer = kit.make(template)
    encoded = encode([chat("u: what\n", "a: the name \n", "u:\tis ", "a:a")], tokenizer, max_length=500)
    assert with_loss(encoded, tokenizer) == "the name<|end|>a<|end|>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (kit.ENDS_LAST_OTHERWISE, "b<|end|>d<|system|>"),
        (kit.ENDS_TWICE, "b<|pad|><|end|>d<|pad|><|end|>"),
        (kit.PLAIN, "b\n\nd\n\n"),
    ],
)
def test_ends_of_several_answers(template, expected):
    tokenizer = kit.make(template)
    encoded = encode([chat("u:q", "a:b", "u:c", "a:d")], tokenizer, max_length=500)
    assert with_loss(encoded, tokenizer) == expected


def test_the_newline_behind_an_end_token_carries_no_loss():
    tokenizer = kit.make(kit.CHATML)
    example = encode([chat("u:q", "a:b")], tokenizer, max_length=500)[0]
    assert tokenizer.decode(example["input_ids"][-2:]) == "<|end|>\n"
    assert example["labels"][-1] == IGNORED
    assert example["labels"][-2] == tokenizer.eos_token_id


def test_short_answer_that_is_part_of_an_end_token():
    tokenizer = kit.make(kit.CHATML)
    assert with_loss(encode([chat("u:q", "a:e")], tokenizer, max_length=500), tokenizer) == "e<|end|>"


def test_answer_that_spells_out_the_end_token_is_whole_and_warned_of():
    tokenizer = kit.make(kit.CHATML)
    encoded = encode([chat("u:q", "a:x<|end|>y")], tokenizer, max_length=500)
    assert with_loss(encoded, tokenizer) == "x<|end|>y<|end|>"
    assert "contains the text of a special token" in encoded.report.warnings[0]


def test_markers_around_content_and_end_need_no_warning():
    assert encode([chat("u:q", "a:b")], kit.make(kit.MARKED_TWICE), max_length=500).report.warnings == ()


def test_end_token_outside_the_markers_is_reported():
    tokenizer = kit.make(kit.MARKED_WITHOUT_END)
    (warning,) = encode([chat("u:q", "a:b"), chat("u:q", "a:c", line=2)], tokenizer, max_length=500).report.warnings
    assert "leaves out the token that ends a turn" in warning
    assert warning.endswith("(2 rows, first f.jsonl:1)")


def test_template_without_an_end_token_is_reported():
    tokenizer = kit.make(kit.PLAIN)
    encoded = encode([chat("u:q", "a:the sum")], tokenizer, max_length=500)
    assert with_loss(encoded, tokenizer) == "the sum\n\n"
    assert "does not learn where to stop" in encoded.report.warnings[0]
    marked = kit.make(
        "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert "does not learn where to stop" in encode([chat("u:q", "a:b")], marked, max_length=500).report.warnings[0]


def test_token_across_the_beginning_of_an_answer_carries_loss_and_is_reported():
    tokenizer = kit.make(kit.PLAIN)
    encoded = encode([chat("u:q", "a::b")], tokenizer, max_length=500)
    assert tokenizer.tokenize("assistant::b")[-2:] == ["::", "b"]  # the premise
    assert with_loss(encoded, tokenizer) == "::b\n\n"
    assert any("begins inside a token" in warning for warning in encoded.report.warnings)


@pytest.mark.parametrize("template", [kit.MARKED, kit.UNMARKED])
def test_special_token_that_swallows_a_space_carries_no_loss(template):
    tokenizer = kit.make(template, swallows_space=True)
    example = encode([chat("u:q", "a:  b")], tokenizer, max_length=500)[0]
    labeled = example["input_ids"][example["labels"] != IGNORED].tolist()
    assert labeled == tokenizer.convert_tokens_to_ids(["b", kit.END])


def test_beginning_of_sequence_stands_once():
    tokenizer = kit.make(kit.LLAMA3, adds_bos=True)
    ids = encode([chat("u:q", "a:b", "u:c", "a:d")], tokenizer, max_length=500)[0]["input_ids"].tolist()
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_loss_on_all_is_everything_but_the_first_token():
    row = chat("s:x", "u:q")
    example = encode([row], kit.make(), max_length=500, loss_on="all")[0]
    assert example["labels"].tolist() == [IGNORED, *example["input_ids"][1:].tolist()]


def test_empty_answer_teaches_its_end_and_is_reported():
    for template in (kit.MARKED, kit.UNMARKED):
        tokenizer = kit.make(template)
        encoded = encode([chat("u:q", "a:")], tokenizer, max_length=500)
        assert with_loss(encoded, tokenizer) == "<|end|>"
        assert "an answer is empty" in encoded.report.warnings[0]


def test_tool_content_may_be_quoted():
    tokenizer = kit.make(kit.TOOLS_AS_JSON)
    encoded = encode([chat("u:q", 't:say "a"', "a:b")], tokenizer, max_length=500)
    assert r'"say \"a\""' in tokenizer.decode(encoded[0]["input_ids"])
    assert with_loss(encoded, tokenizer) == "b<|end|>"


def test_chat_that_begins_with_an_answer():
    tokenizer = kit.make(kit.CHATML)
    encoded = encode([chat("a:the name", "u:q", "a:b")], tokenizer, max_length=500)
    assert with_loss(encoded, tokenizer) == "the name<|end|>b<|end|>"


def test_special_tokens_are_found_whole():
    tokenizer = kit.make()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>2"]})
    assert special_tokens(tokenizer).findall("a<|end|>2<|end|>") == ["<|end|>2", "<|end|>"]


# --- what is refused ---


def test_ignored_role():
    rows = [chat("u:q", "a:b"), chat("s:be the function", "u:q", "a:b", line=2), chat("u:x", "s:sum", "a:b", line=3)]
    found = problems(rows, kit.make(kit.DROPS_SYSTEM))
    assert [p.split(";")[0] for p in found] == [
        "f.jsonl:2: the chat template ignores message 1 with the role 'system'",
        "f.jsonl:3: the chat template ignores message 2 with the role 'system'",
    ]


def test_ignored_role_whose_content_happens_to_appear_elsewhere():
    rows = [chat("s:name", "u:the name", "a:b", line=i) for i in (1, 2)]
    found = problems(rows, kit.make(kit.DROPS_SYSTEM))
    assert [p.split(";")[0] for p in found] == [
        f"f.jsonl:{i}: the chat template ignores message 1 with the role 'system'" for i in (1, 2)
    ]


def test_role_of_which_only_the_name_is_rendered():
    template = kit.CHATML.replace("m.content", "(m.content if m.role != 'system' else '')")
    (found,) = problems([chat("s:be the function", "u:q", "a:b")], kit.make(template))
    assert "ignores message 1 with the role 'system'" in found


def test_empty_message_may_be_left_out():
    assert len(encode([chat("s: ", "u:q", "a:b")], kit.make(kit.DROPS_SYSTEM), max_length=500)) == 1


def test_template_that_refuses_a_role():
    (found,) = problems([chat("u:q", "t:4", "a:b", line=7)], kit.make())
    assert found == "f.jsonl:7: the chat template refuses the row: unknown role tool"


def test_template_that_fails():
    (found,) = problems([chat("u:q", "a:b")], kit.make("{{ messages[0].content + 1 }}"))
    assert found.startswith("f.jsonl:1: the chat template refuses the row: ")


def test_template_that_cuts_an_answer():
    template = kit.CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    (found,) = problems([chat("u:q", "a:hm</think>b")], kit.make(template))
    assert found == "f.jsonl:1: the chat template changes or drops part of the answer in message 2"


def test_answers_that_change_when_others_follow_become_an_example_each():
    tokenizer = kit.make(kit.THINKS_LAST)
    encoded = encode([chat("u:q", "a:b", "u:c", "a:d", line=4)], tokenizer, max_length=500)
    assert [with_loss(encoded, tokenizer, i) for i in range(len(encoded))] == ["<think>b<|end|>", "<think>d<|end|>"]
    texts = [tokenizer.decode(encoded[i]["input_ids"]) for i in range(2)]
    assert texts[0].endswith("<think>b<|end|>\n")
    assert texts[1].startswith(texts[0].replace("<think>", ""))
    assert list(encoded.sources) == ["f.jsonl:4", "f.jsonl:4"]
    assert encoded.report.split == 1
    assert "so the chat is split: one example for each answer" in encoded.report.warnings[0]
    assert len(encode([chat("u:q", "a:b", "u:c", "a:d")], tokenizer, max_length=500, loss_on="all")) == 1


def test_generation_prompt_that_the_answers_do_not_continue():
    tokenizer = kit.make(kit.OPENS_THOUGHT)
    encoded = encode([chat("u:q", "a:<b", "u:c", "a:d")], tokenizer, max_length=500)
    assert with_loss(encoded, tokenizer) == "<b<|end|>d<|end|>"
    assert "generation begins an answer with '<think>\\n', which the answers" in encoded.report.warnings[0]


def test_rows_that_an_unstable_template_renders_stably():
    tokenizer = kit.make(kit.THINKS_LAST)
    encoded = encode([chat("u:q", "a:b")], tokenizer, max_length=500)
    assert with_loss(encoded, tokenizer) == "<think>b<|end|>"


def test_answers_forgotten_in_later_turns():
    tokenizer = kit.make(kit.FORGETS_THOUGHTS)
    encoded = encode([chat("u:q", "a:hm</think>b", "u:c", "a:d")], tokenizer, max_length=500)
    assert [with_loss(encoded, tokenizer, i) for i in range(2)] == ["hm</think>b<|end|>", "d<|end|>"]
    assert "hm" not in tokenizer.decode(encoded[1]["input_ids"])


def test_no_answer_in_a_chat():
    found = problems([chat("u:q", line=1), chat("s:x", "u:q", line=2), chat("u:q", "a:b", line=3)], kit.make())
    assert [p.split(":", 2)[1] for p in found] == ["1", "2"]
    assert all("no message has the role 'assistant'" in p for p in found)


def test_template_that_marks_no_answer():
    template = "{% if false %}{% generation %}{% endgeneration %}{% endif %}" + kit.UNMARKED
    (found,) = problems([chat("u:q", "a:b")], kit.make(template))
    assert "the chat template marks no part of this chat as an answer" in found


def test_no_chat_template():
    (found,) = problems([chat("u:q", "a:b", line=3), chat("u:q", "a:b", line=4)], kit.make(None))
    assert found.startswith("f.jsonl:3: the tokenizer has no chat template, which 2 chat rows need; train on")


@pytest.mark.parametrize("by_pieces", [True, False])
@pytest.mark.parametrize("before", [": ", ":\n", ":  ", ": \n "])
def test_white_space_of_the_prompt_carries_no_loss_whether_or_not_offsets_are_trimmed(
    before: str, by_pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_pieces:
        monkeypatch.setattr(Pieces, "of", staticmethod(lambda tokenizer: None))
    for trim in (False, True):  # as Llama 3's tokenizer, and as GPT-2's
        tokenizer = kit.make(
            kit.CHATML.replace("\n' + m.content", f"{before}' + m.content").replace("nt\n", f"nt{before}")
        )
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
        for content in ("hello there", " hello", "\nhello", "   ", "1  2 "):
            messages = ({"role": "user", "content": "what"}, {"role": "assistant", "content": content})
            (example,) = encode([Row("chat", "f:1", messages=messages)], tokenizer, max_length=99)
            loss = example["input_ids"][example["labels"] != IGNORED]
            assert tokenizer.decode(loss) == f"{content}{kit.END}"
