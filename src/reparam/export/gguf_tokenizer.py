"""Write a byte-level BPE tokenizer into GGUF's metadata.

llama.cpp has the rules that cut a text into words in its own code, and GGUF only names them. The rules of `RULES` are
recognized; a tokenizer with other rules is refused, because llama.cpp would cut texts in another way without a word.
"""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from reparam.errors import ExportError
from reparam.export.gguf_names import INSTEAD

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}


def _split(numbers: str) -> list[dict[str, Any]]:
    pattern = {"type": "Split", "pattern": {"Regex": _WORDS % numbers}, "behavior": "Isolated", "invert": False}
    return [pattern, {**_BYTES, "use_regex": False}]


RULES: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [{**_BYTES, "use_regex": True}],
    "llama-bpe": _split("{1,3}"),
    "qwen2": _split(""),
    "smollm": [{"type": "Digits", "individual_digits": True}, {**_BYTES, "use_regex": True}],
}


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Add the vocabulary, merges, special tokens and chat template to a GGUF writer.

    `rows` is the number of rows of the embedding; ids without a token are marked as unused. Raises ExportError if the
    tokenizer is no byte-level BPE or cuts texts by other rules than those known here.
    """
    import gguf

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"the tokenizer {type(tokenizer).__name__} has no fast version, which GGUF's writer needs")
    told = json.loads(backend.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_rules_of(told))
    added = {token["id"]: token for token in told["added_tokens"]}
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    kinds = gguf.TokenType
    tokens, types = [], []
    for index in range(rows):
        tokens.append(texts.get(index, f"[PAD{index}]"))
        if index in added:
            types.append(kinds.CONTROL if added[index]["special"] else kinds.USER_DEFINED)
        else:
            types.append(kinds.NORMAL if index in texts else kinds.UNUSED)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in told["model"]["merges"]])
    for name in ("bos", "eos", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(
        tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    )
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _rules_of(told: dict[str, Any]) -> str:
    """GGUF's name of the rules by which this tokenizer cuts texts into words."""
    if told["model"].get("type") != "BPE":
        raise ExportError(
            f"the tokenizer is of the type {told['model'].get('type')}, and only byte-level BPE is supported for GGUF; "
            f"{INSTEAD}"
        )
    rules = told["pre_tokenizer"] or {}
    parts = rules.get("pretokenizers", [rules])
    plain = [{key: value for key, value in part.items() if key != "trim_offsets"} for part in parts]
    for name, known in RULES.items():
        if plain == known:
            return name
    raise ExportError(
        f"the tokenizer cuts texts into words by rules that are none of {', '.join(RULES)}, and llama.cpp would use "
        f"others without a warning; {INSTEAD}"
    )
