"""The first rows of a task as the model gets them: the tokens of their texts, and what is expected of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from reparam.data.examples import Examples, texts_of
from reparam.data.preview import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 400  # characters shown of a text


def sample(examples: Examples, tokenizer: PreTrainedTokenizerBase, *, rows: int = 3) -> Group:
    """The first rows, for `Console.print`."""
    parts = []
    for item, features in list(zip(examples.items, examples.features, strict=True))[:rows]:
        texts = [tokenizer.decode(ids) for ids in texts_of(features)]
        lengths = " + ".join(str(len(ids)) for ids in texts_of(features))
        parts.append(Text(f"{item.source}: {lengths} tokens"))
        parts += [Text(printable(f"  {text[:LONGEST]}{'...' if len(text) > LONGEST else ''}")) for text in texts]
        if item.target is not None:
            parts.append(Text(printable(f"  -> {item.target}"[:LONGEST])))
    return Group(*parts)
