"""The linear maps that keywords such as "all-linear" select, by the names of modules."""

from __future__ import annotations

import re

from reparam.sites.parts import WORDS, Parts

KEYWORDS = ("all-linear", "attention", "mlp", "experts", "router", "everything")


def keyword(
    target: str, linear: list[str], *, heads: set[str], routers: dict[str, None], parts: Parts | None
) -> list[str]:
    """The paths among those of linear maps that a keyword, or a word for a part, selects.

    The output `heads` and the `routers` of experts are left out. In a vision-language model, which has `parts`,
    keywords select in the language model.
    """
    if target == "router":
        return list(routers)
    linear = [name for name in linear if name not in heads and name not in routers]
    if parts is not None:
        part, _, kind = target.partition(".") if target in WORDS else ("language", "", target)
        linear, target = [name for name in linear if parts.of(name) == part], kind or "all-linear"
    if target == "all-linear":
        return linear
    blocks = [name for name in linear if re.search(r"(^|\.)\d+\.", name)]
    if target == "experts":
        return [name for name in blocks if re.search(r"(^|\.)\w*experts?\.", name, re.IGNORECASE)]
    attention = [name for name in blocks if re.search(r"attn|attention", name.rsplit(".", 1)[0], re.IGNORECASE)]
    return attention if target == "attention" else [name for name in blocks if name not in attention]
