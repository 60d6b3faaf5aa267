"""Chat templates come from downloaded folders: one that never ends, or fills the memory, is refused with a sentence."""

from __future__ import annotations

from pathlib import Path

import chat_tokenizers as kit
import pytest
from command import reparam, train
from hypothesis import given, settings
from hypothesis import strategies as st
from models import save_base

from reparam.data import rendering
from reparam.data.chat import ChatTemplate
from reparam.errors import DataError

CHAT = [{"role": "user", "content": "hi é 北"}, {"role": "assistant", "content": "yo"}]
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 9 ** 999999999 }}",
]
HUGE = [
    "{{ 'x' * 20000000000 }}",
    "{{ '%99999999999d' % 1 }}",
    "{{ 'x'.ljust(99999999999) }}",
    "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% for i in range(90000) %}{{ 'x' * 9000 }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]
WRONG = ["{% if %}", "{{ a b }}", "{% unknown %}"]
REFUSING = [
    "{% for i in range(99999999) %}{% endfor %}",
    "{{ messages[9].content }}",
    "{{ nothing.at_all }}",
    "{{ 1 / 0 }}",
    "{{ messages.append(1) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ raise_exception('no\nsuch role') }}",
    "{{ namespace(_x=1) }}",
]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 1.0)


@pytest.mark.parametrize("template", [*ENDLESS, *HUGE, *WRONG])
def test_a_template_that_cannot_be_rendered_is_refused_as_a_whole(template: str, impatient: None) -> None:
    with pytest.raises(DataError, match=r"the chat template .*chat_template\.jinja") as caught:
        rendering.render(template, {"messages": CHAT})
    assert "\n" not in str(caught.value)
    assert rendering.render("{{ messages[0].content }}", {"messages": CHAT}) == (CHAT[0]["content"], [])


@pytest.mark.parametrize("template", REFUSING)
def test_the_errors_of_a_template_are_one_sentence(template: str) -> None:
    with pytest.raises(ValueError, match="the chat template refuses the row: ") as caught:
        rendering.render(template, {"messages": CHAT})
    assert not isinstance(caught.value, DataError)
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_a_chat_is_rendered_as_by_transformers(contents: list[str]) -> None:
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    for template in (kit.MARKED, kit.CHATML, kit.LLAMA3, kit.TOOLS_AS_JSON, kit.FORGETS_THOUGHTS, kit.ENDS_THE_TEXT):
        tokenizer = kit.make(template)
        expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert ChatTemplate(tokenizer).prompt(chat) == expected


@pytest.mark.parametrize("template", [HUGE[0], ENDLESS[0], WRONG[0], REFUSING[0], REFUSING[2]])
def test_every_command_refuses_such_a_base(
    template: str, tmp_path: Path, impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    save_base(base)
    (base / "chat_template.jinja").write_text(template)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}]}\n' * 12)
    for command in (
        ("generate", "hi", "--base", base),
        ("eval", rows, "--base", base),
    ):
        assert reparam(*command) == 2, command
        said = capsys.readouterr().err
        assert "the chat template" in said
        assert "Traceback" not in said
    assert train(str(base), str(rows), tmp_path / "out") == 2
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_raw_prompt_needs_no_template(tmp_path: Path, impatient: None) -> None:
    base = tmp_path / "base"
    save_base(base)
    (base / "chat_template.jinja").write_text(ENDLESS[0])
    assert reparam("generate", "def f(", "--base", base, "--raw", "--max-new-tokens", 2) == 0
