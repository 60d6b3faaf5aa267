"""The fast ways to tokenize and to render give exactly what the tokenizer and the template give."""

from __future__ import annotations

import chat_tokenizers as kit
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from reparam.data.chat import ChatTemplate
from reparam.data.cuts import EXPRESSIONS
from reparam.data.known import LONGEST, Known, Strings
from reparam.data.offsets import with_offsets
from reparam.data.pieces import Pieces

byte_level = pre_tokenizers.ByteLevel
TEXTS = [
    "what is the name of the function",
    "the sum of 12345 numbers",
    "It's  they'Re a::b\n\n  x = y.z\t é ü 北京",
    "  \n",
]


def make(
    before: list[pre_tokenizers.PreTokenizer],
    *,
    use_regex: bool,
    nfc: bool = False,
    trim: bool | None = None,
    space: bool = False,
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    steps = [*before, byte_level(add_prefix_space=False, use_regex=use_regex)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if before else steps[0]
    backend.decoder = decoders.ByteLevel()
    if nfc:
        backend.normalizer = normalizers.NFC()
    if trim is not None:
        backend.post_processor = processors.ByteLevel(trim_offsets=trim, add_prefix_space=space)
    special = [AddedToken(name, normalized=False) for name in (kit.END, "<tool>")]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=kit.END)


def expression(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


TOKENIZERS = {
    "gpt2": make([], use_regex=True),
    "trimmed": make([], use_regex=True, trim=True),
    "digits": make([pre_tokenizers.Digits(individual_digits=True)], use_regex=True),
    **{f"expression {i}": make([expression(e)], use_regex=False) for i, e in enumerate(EXPRESSIONS)},
    "trimmed, with a space": make([], use_regex=True, trim=True, space=True),
    "qwen": make([expression(EXPRESSIONS[2])], use_regex=False, nfc=True, trim=False),
}
PIECES = {name: Pieces.of(tokenizer) for name, tokenizer in TOKENIZERS.items()}

SPACES = [" ", " ", "  ", "\n", "\r\n", "\t", "\xa0", "\u3000", "\u2028", "\x1c", "\x85", "\u200b"]
WORDS = ["a", "the", "It's", "'re", "'", ".", "::", "1", "12345", "/", "<", kit.END, "<tool>"]
OTHERS = ["é", "e\u0301", "\u0301", "北京", "ß", "Ǆ", "😀"]
bits = st.sampled_from([*SPACES, *WORDS, *OTHERS])
texts = st.lists(bits, max_size=12).map("".join) | st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=200)
@given(text=texts, data=st.data())
def test_tokens_and_their_places_are_those_of_the_tokenizer(name: str, text: str, data: st.DataObject) -> None:
    pieces = PIECES[name]
    assert pieces is not None
    (ours,), (theirs,) = pieces([text]), with_offsets(TOKENIZERS[name], [text])
    assert ours.ids.tolist() == theirs.ids.tolist()
    position = data.draw(st.integers(0, len(text)))
    assert ours.before(position) == theirs.before(position), (text, position)


@given(text=texts)
def test_bytes_of_tokens(text: str) -> None:
    (ours,) = PIECES["gpt2"]([text])
    assert ours.text_bytes(0, len(ours.ids)) == len(text.encode())
    assert sum(ours.text_bytes(i, i + 1) for i in range(len(ours.ids))) == len(text.encode())


def test_pieces_that_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reparam.data.pieces.KNOWN", 3)
    tokenizer = TOKENIZERS["gpt2"]
    pieces = Pieces.of(tokenizer)
    text = "the sum of the numbers " + "x" * 100 + " is the name of the function " * 3
    for _ in range(2):
        (ours,), (theirs,) = pieces([text]), with_offsets(tokenizer, [text])
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert [ours.before(i) for i in range(len(text))] == [theirs.before(i) for i in range(len(text))]


@pytest.mark.parametrize("bits", [5, 12])
@given(added=st.lists(st.binary(max_size=60), max_size=40, unique=True), asked=st.lists(st.binary(max_size=60)))
def test_the_table_of_strings_is_exact_when_places_collide(bits: int, added: list[bytes], asked: list[bytes]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reparam.data.known.BITS", bits)
        table, room = Known(room=30), {}
        for some in (added[:20], added[20:]):
            room |= {key: entry for key, entry in zip(some, table.add(strings(some)).tolist(), strict=True) if entry}
        everything = [*added, *asked, *(key + b"\0" for key in added), *(key[:-1] for key in added)]
        found = table.find(strings(everything)).tolist()
    assert found == [room.get(key, 0) for key in everything]
    assert len(room) <= 30
    assert max(map(len, room), default=0) <= LONGEST
    assert bits == 5 or len(room) == min(30, sum(len(key) <= LONGEST for key in added))


def strings(values: list[bytes]) -> Strings:
    sizes = np.array([len(value) for value in values], dtype=np.int64)
    return Strings(b"".join(values) + b"rest", np.cumsum(sizes) - sizes, sizes)


def test_settings_of_other_calls_are_not_kept() -> None:
    tokenizer = make([], use_regex=True)
    pieces = Pieces.of(tokenizer)
    tokenizer("the name", truncation=True, max_length=1)
    assert len(pieces(["the name of the function"])[0].ids) == len(tokenizer("the name of the function")["input_ids"])


def other(change: str) -> PreTrainedTokenizerFast:
    backend = TOKENIZERS["gpt2"].backend_tokenizer.to_str()
    backend = Tokenizer.from_str(backend)
    match change:
        case "prefix":
            backend.pre_tokenizer = byte_level(add_prefix_space=True)
        case "lower":
            backend.normalizer = normalizers.Lowercase()
        case "expression":
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [expression(r"\w+ \w+|\s+"), byte_level(add_prefix_space=False, use_regex=False)]
            )
        case "no words":
            backend.pre_tokenizer = byte_level(add_prefix_space=False, use_regex=False)
        case "strips":
            backend.add_special_tokens([AddedToken("<s>", rstrip=True)])
        case "no bytes":
            backend.model = models.BPE({"a": 0, "b": 1}, [])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=kit.END)


@pytest.mark.parametrize("change", ["prefix", "lower", "expression", "no words", "strips", "no bytes"])
def test_tokenizers_whose_texts_cannot_be_cut_are_left_alone(change: str) -> None:
    assert Pieces.of(other(change)) is None


TEMPLATES = {name: value for name, value in vars(kit).items() if name.isupper() and "for m in messages" in str(value)}
contents = st.sampled_from(
    ["a", "the name", " a ", "a\n", "", "</think>b", "<think>\nc</think>d", f"x{kit.END}", "{{ x }}"]
)
some_messages = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), contents), min_size=1, max_size=5)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("loss_on", ["answers", "last", "all"])
@settings(max_examples=15)
@given(chats=st.lists(some_messages, min_size=1, max_size=4))
def test_chats_rendered_together_are_those_rendered_alone(name: str, loss_on: str, chats: list) -> None:
    template = _template(name)
    messages = [[{"role": role, "content": content} for role, content in chat] for chat in chats]
    for number, found in template.render_plain(messages, loss_on=loss_on).items():
        alone = template.render(messages[number], loss_on=loss_on)
        assert [(each.text, each.spans) for each in found] == [(each.text, each.spans) for each in alone]
        assert not any(each.warnings for each in alone)


def test_most_chats_are_rendered_together() -> None:
    chats = [
        [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"the {i}."}] * (1 + i % 3)
        for i in range(200)
    ]
    for name in ("MARKED", "UNMARKED", "CHATML", "LLAMA3", "STRIPS"):
        assert sorted(_template(name).render_plain(chats, loss_on="answers")) == list(range(200)), name


_made: dict[str, ChatTemplate] = {}


def _template(name: str) -> ChatTemplate:
    if name not in _made:
        _made[name] = ChatTemplate(kit.make(TEMPLATES[name]))
    return _made[name]


def test_ids_are_of_32_bits() -> None:
    assert PIECES["gpt2"](["", "a"])[0].ids.dtype == PIECES["gpt2"](["a"])[0].ids.dtype == np.int32
