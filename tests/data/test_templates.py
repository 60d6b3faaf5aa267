"""Chat templates by name, file and folder. The judge of what they render is transformers."""

from __future__ import annotations

import json

import pytest
import trl
from chat_tokenizers import CHATML, DROPS_SYSTEM, make

from reparam.data.encode import encode
from reparam.data.framing import frame
from reparam.data.row import Row
from reparam.data.templates import chosen, names
from reparam.errors import DataError

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "bye"},
]
CHATML_TEXT = (
    "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    "<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\nbye<|im_end|>\n"
)


def with_tokens(*tokens: str, **settings):
    tokenizer = make(None, **settings)
    tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)})
    return tokenizer


def test_chatml_is_that_of_transformers_and_trl():
    tokenizer = with_tokens("<|im_start|>", "<|im_end|>")
    text = chosen("chatml", tokenizer)
    assert tokenizer.apply_chat_template(CHAT, chat_template=text, tokenize=False) == CHATML_TEXT
    assert (
        tokenizer.apply_chat_template(CHAT[:2], chat_template=text, tokenize=False, add_generation_prompt=True)
        == "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    theirs = chosen("qwen2_5", tokenizer)  # TRL's; without tools, it writes ChatML
    assert tokenizer.apply_chat_template(CHAT, chat_template=theirs, tokenize=False) == CHATML_TEXT


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_plain_template_needs_no_token_but_the_end_and_begins_as_texts_do(adds_bos):
    tokenizer = make(None, adds_bos=adds_bos)
    tokenizer.chat_template = chosen("plain", tokenizer)
    given = tokenizer.apply_chat_template(CHAT, tokenize=False)
    parts = ("be kind", "### User:\nhi", "### Assistant:\nhello<|end|>", "### User:\nand", "### Assistant:\nbye<|end|>")
    assert given == ("<|bos|>" if adds_bos else "") + "".join(f"{part}\n\n" for part in parts)
    marks = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    encoded = encode([Row("chat", "f:1", messages=tuple(CHAT))], tokenizer, max_length=500)
    assert encoded.ids.tolist() == marks["input_ids"]
    assert encoded.loss.int().tolist() == marks["assistant_masks"]


def test_a_named_template_that_would_never_stop_is_refused():
    for name in ("chatml", "gemma", "qwen3"):
        with pytest.raises(DataError, match=r"generation\s+would not stop; choose plain"):
            chosen(name, make(None))
    with pytest.raises(DataError, match="'eos_token' is undefined"):
        chosen("plain", make(None, end=None))


def test_the_twin_is_the_one_that_trl_gives():
    tokenizer = with_tokens("<|im_start|>", "<|im_end|>")
    for name in ("qwen2_5", "qwen3", "llama3", "gemma3"):
        tokenizer.chat_template = chosen.__globals__["_named"](name)
        twin = trl.chat_template_utils.get_training_chat_template(processing_class=tokenizer)
        assert chosen("trl", tokenizer) == twin
    tokenizer.chat_template = twin
    assert chosen("trl", tokenizer) == twin
    tokenizer.chat_template = CHATML
    with pytest.raises(DataError, match="TRL has no twin"):
        chosen("trl", tokenizer)
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        chosen("trl", make(None))


def test_files_and_folders(tmp_path):
    (tmp_path / "mine.jinja").write_text(CHATML)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": DROPS_SYSTEM}))
    tokenizer = make(None)
    assert chosen(str(tmp_path / "mine.jinja"), tokenizer) == CHATML
    assert chosen(str(tmp_path), tokenizer) == DROPS_SYSTEM
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert chosen(str(tmp_path), tokenizer) == CHATML
    assert tokenizer.chat_template is None


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jinja", None, "no such file"),
        ("a.jinja", b"", "holds no chat template"),
        ("a.jinja", b"\xff\xfe", "no chat template can be read"),
        ("a.jinja", b"{% for m in messages %}", "cannot be read"),
        ("a.jinja", b"{% for i in range(10**12) %}{% endfor %}", "takes longer|refuses"),
        ("a.jinja", b"x" * (2**20 + 1), "at most"),
        ("", None, "the folder has no chat template"),
    ],
)
def test_what_is_no_template(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence) as caught:
        chosen(f"{tmp_path}/{name}", make(None))
    assert str(tmp_path) in str(caught.value)


def test_an_unknown_name_is_answered_with_near_ones():
    with pytest.raises(DataError, match="did you mean 'llama3'"):
        chosen("lama3", make(None))
    assert {"chatml", "plain", "llama3", "qwen3", "gemma3_training"} <= set(names())


def test_a_system_message_is_added_to_chats_without_one():
    tokenizer = make(CHATML)
    mine = frame(tokenizer, system="Be brief.")
    own, other = (Row("chat", "f:1", messages=tuple(messages)) for messages in (CHAT, CHAT[1:3]))
    text = Row("completion", "f:2", prompt="a", completion="b")
    found = list(mine.rows([own, other, text]))
    assert found[0] == own
    assert found[1].messages == ({"role": "system", "content": "Be brief."}, *CHAT[1:3])
    assert found[2] == text
    for template in (DROPS_SYSTEM, "{{ raise_exception('no') }}"):
        with pytest.raises(DataError, match=r"data.system: the chat template ignores or refuses"):
            frame(make(template), system="Be brief.")


@pytest.mark.parametrize("variable", ["enable_thinking", "thinking"])
def test_thinking_sets_the_variable_of_the_template_where_a_row_does_not(variable):
    template = CHATML.replace("assistant\n'", f"assistant\n' + ('' if {variable} is false else '<think>')")
    tokenizer = make(template)
    row, own = (Row("chat", "f:1", messages=tuple(CHAT), variables=given) for given in ({}, {variable: True}))
    found = frame(tokenizer, thinking=False).rows([row, own])
    assert [each.variables for each in found] == [{variable: False}, {variable: True}]
    with pytest.raises(DataError, match=r"data.thinking: nothing in the chat template depends on it"):
        frame(make(CHATML), thinking=True)
