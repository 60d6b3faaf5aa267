"""The output of `reparam data`: lines and a histogram in the terminal, JSON, and a plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from reparam.core.text import counted
from reparam.data.preview import preview
from reparam.data.study import Contents, Lengths, Pair
from reparam.evaluation.png import write_png
from reparam.evaluation.terminal import note, say
from reparam.recipes.data import Studied, Study, Unseen

PLOT = "lengths.png"
LONGEST_BAR = 40  # characters
SHOWN = 3  # rows, tokens or pairs that a line names


def show(done: Studied, console: Console, *, rows: int) -> None:
    """Print the study as lines, with a histogram of the lengths and the masks of the first `rows` rows."""
    found = done.study
    lines = [("rows", _contents(found.contents)), ("held out", _held_out(found))]
    if found.lengths is not None:
        lines += _token_lines(found, found.lengths)
    lines.append(("duplicates", _pairs(found.duplicates, "no row repeats another one", "row", "repeat an earlier one")))
    lines += _overlap(found)
    for name, text in lines:
        say(console, f"{name:<16}{text}")
    if found.lengths is not None:
        say(console, Histogram(found.lengths, found.cut.max_length if found.cut else None))
    if found.lengths is not None:
        untrained = _unseen(found.unseen)
        say(console, note("note", untrained) if found.unseen else f"{'untrained':<16}{untrained}")
    for warning in found.warnings:
        say(console, note("note", warning))
    if found.base is None:
        say(console, note("note", "lengths, masks and what is cut depend on the tokenizer: pass --base MODEL"))
    if done.encoded is not None and done.tokenizer is not None and rows:
        say(console, preview(done.encoded, done.tokenizer, rows=rows))


def as_json(done: Studied, *, rows: int) -> dict[str, Any]:
    """The study as JSON values, with the masks of the first `rows` rows."""
    found, encoded, tokenizer = done
    told = dataclasses.asdict(found)
    for key in ("duplicates", "in_held_out", "question_in_held_out"):
        told[key] = {"rows": len(told[key]), "first": [pair._asdict() for pair in getattr(found, key)[:10]]}
    told["unseen"] = None if found.unseen is None else [token._asdict() for token in found.unseen]
    told["masks"] = []
    if encoded is not None and tokenizer is not None:
        shown = preview(encoded, tokenizer, rows=rows)
        told["masks"] = [
            {
                "row": encoded.sources[i],
                "parts": [{"text": text, "tokens": count, "loss": loss} for loss, count, text in shown.runs(i)],
            }
            for i in range(min(rows, len(encoded)))
        ]
    return told


def plot(found: Study, file: Path) -> None:
    """Write the histogram of the lengths as a PNG, with lines at `max_length` and at what is recommended."""
    assert found.lengths is not None
    assert found.cut is not None
    figure = Figure(figsize=(7, 4), layout="constrained", dpi=120)
    axes = figure.subplots()
    bars = found.lengths.histogram
    widths = [bar.longest - bar.shortest + 1 for bar in bars]
    axes.bar([bar.shortest for bar in bars], [bar.rows for bar in bars], width=widths, align="edge", edgecolor="white")
    if found.cut.max_length <= 2 * found.lengths.longest:  # a line further away would leave no room for the bars
        axes.axvline(found.cut.max_length, color="tab:red", linewidth=1, label=f"max_length = {found.cut.max_length:,}")
    if found.recommended_max_length is not None:
        label = f"recommended: {found.recommended_max_length:,}"
        axes.axvline(found.recommended_max_length, color="black", linewidth=1, linestyle="--", label=label)
    axes.set(xlabel="tokens of a row", ylabel="rows", xlim=(0, None))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_png(figure, file)


class Histogram:
    """A histogram of lengths for a terminal. Bars beyond `max_length` are red."""

    def __init__(self, lengths: Lengths, max_length: int | None) -> None:
        self._bars = lengths.histogram
        self._max_length = max_length

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield one line for each bar."""
        most = max(bar.rows for bar in self._bars)
        wide = max(len(f"{bar.longest:,}") for bar in self._bars)
        room = max(8, min(LONGEST_BAR, options.max_width - 2 * wide - 16))
        full, dash = ("#", "-") if options.ascii_only else ("█", "–")
        for bar in self._bars:
            size = max(round(room * bar.rows / most), bar.rows > 0)
            beyond = self._max_length is not None and bar.longest > self._max_length
            label = f"{bar.shortest:>{wide},} {dash} {bar.longest:>{wide},}  "
            yield Text.assemble(label, (full * size, "red" if beyond else "green"), f" {bar.rows:,}")


def _contents(found: Contents) -> str:
    kinds = [(found.chats, "chat"), (found.completions, "completion"), (found.texts, "text")]
    parts = [f"{', '.join(counted(count, kind) for count, kind in kinds if count)} in all"]
    if found.chats:
        low, high = found.messages
        parts[0] += f", of {low if low == high else f'{low} to {high}'} messages"
        parts.append("messages by role: " + ", ".join(f"{role} {count:,}" for role, count in found.roles.items()))
    more = [
        (found.with_tools, "chat", "with tools"),
        (found.tool_calls, "tool call", ""),
        (found.with_reasoning, "answer", "with reasoning"),
        (found.excluded, "answer", "without loss by a flag"),
    ]
    parts += [f"{counted(count, noun)} {rest}".rstrip() for count, noun, rest in more if count]
    return "; ".join(parts)


def _held_out(found: Study) -> str:
    if found.held_out_from == found.files:
        return f"training would hold out {counted(found.held_out, 'row')} of these" if found.held_out else "none"
    return f"{counted(found.held_out, 'row')} of {', '.join(found.held_out_from)}"


def _token_lines(found: Study, lengths: Lengths) -> list[tuple[str, str]]:
    assert found.cut is not None
    assert found.tokens is not None
    assert found.loss_tokens is not None
    share = found.loss_tokens / found.tokens
    lines = [
        ("tokens", f"{found.tokens:,}, {found.loss_tokens:,} of them with loss ({share:.0%})"),
        (
            "lengths",
            f"{lengths.shortest:,} to {lengths.longest:,} tokens; median {lengths.median:,}; 95 % of the rows have at "
            f"most {lengths.p95:,}, 99 % at most {lengths.p99:,}",
        ),
        ("max_length", _cut(found)),
        ("recommended", f"--data.max_length {found.recommended_max_length}{_why(found, lengths)}"),
    ]
    if found.not_used:
        lines.append(("not used", ", ".join(found.not_used)))
    return lines


def _cut(found: Study) -> str:
    cut = found.cut
    assert cut is not None
    if not cut.longer:
        return f"{cut.max_length:,} cuts no row"
    text = f"{cut.max_length:,} is shorter than {counted(cut.longer, 'row')} ({cut.share:.1%}): {', '.join(cut.first)}"
    text += ", ..." if cut.longer > len(cut.first) else ""
    if found.contents.texts:
        return f"{text}; texts are split, so they lose nothing"
    return f"{text}; {cut.lose_loss:,} lose tokens with loss, and {cut.lose_answer:,} of these lose their whole answer"


def _why(found: Study, lengths: Lengths) -> str:
    wanted = found.recommended_max_length
    assert wanted is not None
    if wanted >= lengths.longest:
        return ", which keeps every row whole"
    if wanted == found.context:
        return f", the context length of the base; the longest row has {lengths.longest:,} tokens"
    return f", which keeps 99 % of the rows whole; the longest row has {lengths.longest:,} tokens"


def _overlap(found: Study) -> list[tuple[str, str]]:
    if not found.held_out:
        return []
    none = "no training row stands in the held-out rows"
    lines = [("in held-out rows", _pairs(found.in_held_out, none, "row", "also stand there"))]
    if found.question_in_held_out:
        text = _pairs(found.question_in_held_out, "", "question", "also stand there, with another answer")
        lines.append(("", text))
    return [(f"{name:<16}" if len(name) < 16 else f"{name} ", text) for name, text in lines]


def _pairs(pairs: Sequence[Pair], none: str, noun: str, what: str) -> str:
    if not pairs:
        return none
    names = ", ".join(f"{pair.row} = {pair.same_as}" for pair in pairs[:SHOWN])
    verb = what if len(pairs) > 1 else what.replace("repeat", "repeats").replace("stand", "stands")
    return f"{counted(len(pairs), noun)} {verb}: {names}{', ...' if len(pairs) > SHOWN else ''}"


def _unseen(tokens: Sequence[Unseen] | None) -> str:
    if tokens is None:
        return "unknown: the weights of the base are not on this machine, or its embedding is quantized"
    if not tokens:
        return "the base has seen every token of the rows: no embedding looks untrained"
    names = ", ".join(f"{t.token} (id {t.id}, {t.times:,} times)" for t in tokens[: 2 * SHOWN])
    more = ", ..." if len(tokens) > 2 * SHOWN else ""
    return (
        f"the base has probably never seen {counted(len(tokens), 'token')} of the rows, because the embedding looks "
        f"untrained: {names}{more}; LoRA on linear maps cannot learn them: train the embeddings too, or choose a chat "
        f"template without them"
    )
