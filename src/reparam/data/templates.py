"""Chat templates that are chosen by name, by file or by folder, in place of the tokenizer's own.

Two are part of reparam. The others are those of the installed TRL: it ships the templates of many model families and,
for most, a twin for training, in which `{% generation %}` marks what the model writes.
"""

from __future__ import annotations

import importlib.util
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from reparam.core.checks import nearest
from reparam.core.strict_json import loads
from reparam.core.text import not_utf8
from reparam.data.chat import ChatTemplate
from reparam.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TWIN = "trl"  # the choice of the twin for training of the tokenizer's own template
LARGEST = 1 << 20  # bytes of a template
FILES = ("chat_template.jinja", "tokenizer_config.json")
START = "{{ bos_token }}"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}"
    "{% elif message.role == 'user' %}{{ '### User:\\n' + message.content + '\\n\\n' }}"
    "{% elif message.role == 'assistant' %}"
    "{{ '### Assistant:\\n' }}{% generation %}{{ message.content + eos_token }}{% endgeneration %}{{ '\\n\\n' }}"
    "{% else %}{{ raise_exception('no role ' + message.role + ': expected system, user or assistant') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
OWN = {"chatml": CHATML, "plain": PLAIN}
"""Templates of reparam. `plain` needs no special token but the end token, so it suits any base without a template."""


def names() -> list[str]:
    """The names of all templates that can be chosen, sorted."""
    return sorted({*OWN, *_of_trl()})


def is_path(choice: str) -> bool:
    """Whether a choice is the path of a file or folder, and not a name.

    >>> is_path("chatml"), is_path("my.jinja"), is_path("./chatml")
    (False, True, True)
    """
    return choice not in OWN and (os.sep in choice or choice.endswith((".jinja", ".j2")))


def chosen(choice: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template that `choice` means, as text.

    `choice` is "trl", which is TRL's twin for training of the tokenizer's own template; the path of a file, or of a
    folder with a tokenizer; or one of `names()`. A named template begins with the start token if the tokenizer puts
    this one at the start of texts.

    Raises DataError if there is no such template, if TRL has no twin, or if the template cannot be read; and if a named
    template ends answers with a token that the tokenizer does not have, because generation would not stop.
    """
    if choice == TWIN:
        return _twin(tokenizer)
    if is_path(choice):
        text = _read(Path(choice))
        _check(choice, text, tokenizer)
        return text
    text = OWN.get(choice) or _named(choice)
    if choice in OWN and _adds_start(tokenizer):
        text = START + text
    if not _check(choice, text, tokenizer):
        raise DataError(
            [
                f"the chat template {choice} ends answers with a token that the tokenizer does not have, so generation "
                f"would not stop; choose plain, which needs no such token, or add the tokens to the base"
            ]
        )
    return text


def _check(choice: str, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The token with which the template ends an answer, or "". Raises DataError if the template cannot be used."""
    before = tokenizer.chat_template
    tokenizer.chat_template = text
    try:
        return ChatTemplate(tokenizer).end_of_answer()
    except ValueError as error:
        raise DataError([f"the chat template {choice} cannot be used with this tokenizer: {error}"]) from None
    finally:
        tokenizer.chat_template = before


def _adds_start(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _of_trl() -> dict[str, Path]:
    """The templates of the installed TRL by name; empty if it is not installed."""
    found = importlib.util.find_spec("trl")
    places = (found.submodule_search_locations or []) if found is not None else []
    return {path.stem: path for place in places for path in Path(place, "chat_templates").glob("*.jinja")}


def _named(choice: str) -> str:
    known = _of_trl()
    if choice in known:
        return _read(known[choice])
    if not known:
        raise DataError(
            [
                f"no chat template is named {choice!r}: expected {', '.join(OWN)}, or a file that ends in .jinja; more "
                f"names are known where TRL is installed: pip install trl"
            ]
        )
    plain = ", ".join(name for name in names() if not name.endswith("_training"))
    raise DataError(
        [
            f"no chat template is named {choice!r}{nearest(choice, names())}; expected {TWIN}, a file that ends in "
            f".jinja, a folder such as ./{choice}, or one of {plain}"
        ]
    )


def _twin(tokenizer: PreTrainedTokenizerBase) -> str:
    known = _of_trl()
    if not known:
        raise DataError(["the chat template trl is one of TRL, which is not installed: pip install trl"])
    if not tokenizer.chat_template:
        raise DataError(
            ["the tokenizer has no chat template, so TRL has no twin of it; choose plain or another one by its name"]
        )
    own = tokenizer.get_chat_template()
    for name, path in known.items():
        if f"{name}_training" in known and _read(path) == own:
            return _read(known[f"{name}_training"])
    if "{% generation %}" in own or "{%- generation" in own:
        return own  # it marks the answers itself
    raise DataError(
        [
            "TRL has no twin for training of the tokenizer's chat template; leave the choice out, because answers are "
            "found without it, or choose a template by its name"
        ]
    )


def _read(path: Path) -> str:
    """The template in a file, or in a folder with a tokenizer."""
    if path.is_dir():
        held = [path / name for name in FILES if (path / name).is_file()]
        if not held:
            raise DataError([f"{path}: the folder has no chat template: neither {' nor '.join(FILES)}"])
        path = held[0]
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
            raise DataError([f"{path}: a chat template is a file of at most {LARGEST:,} bytes"])
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            text = loads(text).get("chat_template")
    except FileNotFoundError:
        raise DataError([f"{path}: no such file of a chat template"]) from None
    except UnicodeDecodeError as error:
        raise DataError([f"{path}: no chat template can be read from it: {not_utf8(error)}"]) from None
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise DataError([f"{path}: no chat template can be read from it: {error}"]) from None
    if not isinstance(text, str) or not text.strip():
        raise DataError([f"{path}: holds no chat template"])
    return text
