"""Chat with a model in the terminal, with an adapter and optionally with the base model for comparison."""

from __future__ import annotations

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from reparam.adapter.selection import select
from reparam.core.text import visible
from reparam.data.chat import ChatTemplate
from reparam.evaluation.score import complete
from reparam.evaluation.terminal import say
from reparam.hf.open import open_model
from reparam.recipes.task import check_task


class Chat:
    """A chat with a base model and, optionally, an adapter. Each answer is decoded greedily.

    With `raw`, the prompt is continued as plain text. `task` names the task for a mixture adapter whose gates depend on
    it. Raises ValueError if the tokenizer has no chat template and `raw` is not set, and for a task of an adapter that
    has no tasks.
    """

    def __init__(
        self,
        base: str | None,
        adapter: str | None,
        *,
        dtype: str,
        raw: bool,
        max_new_tokens: int,
        storage: str | None = None,
        task: str | None = None,
    ) -> None:
        check_task(task, adapter)
        self.model, self.tokenizer, self.adapter = open_model(base, adapter, dtype=dtype, storage=storage)
        self.raw = raw
        self.tasks = None if task is None else [task]
        self.max_new_tokens = max_new_tokens
        if not raw and not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; add --raw to continue the prompt as plain text")

    def reply(self, messages: list[dict[str, str]], *, adapter: bool) -> str:
        """Generate the greedy answer to the conversation so far, with the adapter or with the base alone."""
        if self.raw:
            ids = self.tokenizer(messages[-1]["content"])["input_ids"]
        else:
            text = ChatTemplate(self.tokenizer).prompt(messages)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.adapter is None:
            return complete(self.model, self.tokenizer, [ids], max_new_tokens=self.max_new_tokens)[0]
        tasks = self.tasks if adapter else None
        with select(self.model, self.adapter.name if adapter else None):
            return complete(self.model, self.tokenizer, [ids], max_new_tokens=self.max_new_tokens, tasks=tasks)[0]

    def answer(
        self, prompt: str, console: Console, *, compare: bool, before: list[dict[str, str]] | None = None
    ) -> str:
        """Print and return the answer to `prompt`. With `compare`, also print the answer of the base model."""
        messages = [*(before or []), {"role": "user", "content": prompt}]
        text = self.reply(messages, adapter=True)
        if compare and self.adapter is not None:
            other = self.reply(messages, adapter=False)
            panels = [
                Panel(Text(visible(other)), title="base"),
                Panel(Text(visible(text)), title="with adapter", style="green"),
            ]
            say(console, Columns(panels, equal=True, expand=True))
        else:
            say(console, text)
        return text

    def loop(self, console: Console, *, compare: bool) -> None:
        """Read and answer prompts until an empty line or the end of input."""
        messages: list[dict[str, str]] = []
        say(console, "enter an empty line to quit", style="dim")
        while prompt := _read(console):
            text = self.answer(prompt, console, compare=compare, before=messages)
            if not self.raw:
                messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]


def _read(console: Console) -> str:
    try:
        return console.input(Text("> ", "bold")).strip()
    except EOFError:
        return ""
