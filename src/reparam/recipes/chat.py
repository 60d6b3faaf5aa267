"""Ask a model: with several adapters and the base side by side, in one mixed batch."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from reparam.adapter.load import load
from reparam.core.text import visible
from reparam.data.chat import ChatTemplate
from reparam.data.framing import Frame, frame
from reparam.data.messages import Messages
from reparam.data.questions import Question
from reparam.data.templates import chosen
from reparam.errors import DataError
from reparam.evaluation.complete import GREEDY, Sampling, complete
from reparam.evaluation.engine import answers_of, opened
from reparam.evaluation.terminal import say
from reparam.hf.open import open_model, prompted
from reparam.hf.prompts import prompting_of
from reparam.hf.stops import stop_tokens
from reparam.io.files import adapter_folder
from reparam.io.prompt_format import PromptFormat
from reparam.recipes.pictures import Pictures
from reparam.recipes.task import check_task

STYLES = ("green", "cyan", "magenta", "yellow")  # of the frames around the adapters' answers


@dataclasses.dataclass(frozen=True)
class Asking:
    """How prompts are made. What is None is as the adapter was trained, or the default of the base."""

    raw: bool | None = None
    """Continue prompts as plain text, without the chat template."""
    chat_template: str | None = None
    """A chat template, as `data.chat_template` of training."""
    system: str | None = None
    """System message of chats without one; "" for none."""
    thinking: bool | None = None
    """Whether chats are rendered with thinking."""


@dataclasses.dataclass(frozen=True)
class Speaker:
    """One of those who answer: an adapter, or the base."""

    label: str
    """The folder of the adapter; "base" for the base."""
    adapter: str | None
    """Name of the adapter on the model; None for the base."""
    tokenizer: PreTrainedTokenizerBase
    """Has the chat template that the adapter was trained with."""
    frame: Frame
    raw: bool
    """Whether prompts are continued as plain text."""
    trained_on: str | None = None
    """The kind of the adapter's training rows, if `raw` follows from it."""
    pictures: Pictures | None = None
    """The images that prompts are about."""

    def ids(self, asked: str | Messages, variables: Mapping[str, Any] | None = None) -> list[int]:
        """The token ids of a text to continue, or of a chat up to where its next answer begins."""
        if isinstance(asked, str):
            return self.pictures.ids(asked, raw=True) if self.pictures else list(self.tokenizer(asked)["input_ids"])
        text = self._template.prompt(self.frame.messages(asked), {**self.frame.variables, **(variables or {})})
        if self.pictures:
            return self.pictures.ids(text, raw=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        return self.pictures.template(self.tokenizer) if self.pictures else ChatTemplate(self.tokenizer)


class Chat:
    """A base model and adapters that are asked the same questions.

    Args:
        base: folder or hub id of the base; None for the one that the first adapter's files name.
        adapters: folders of adapters of one base, or of their training runs.
        compare: whether the base answers, too.
        asking: how prompts are made; by default, as each adapter was trained.
        sampling: how tokens are chosen.
        max_new_tokens: the maximum length of an answer, in tokens.
        dtype: dtype of the base, or "auto".
        storage: storage of the base; None for that of the first adapter's training.
        task: the task, for an adapter whose gates depend on it; only with one adapter.
        images: files of images that the first prompt is about, for a vision-language model.

    Raises ValueError if there is no chat template and `raw` is not set, if a setting of `asking` has no effect, for a
    task of an adapter that has no tasks, and if the adapters are not of one base.
    """

    def __init__(
        self,
        base: str | None,
        adapters: Sequence[str] = (),
        *,
        compare: bool = False,
        asking: Asking = Asking(),
        sampling: Sampling = GREEDY,
        max_new_tokens: int = 128,
        dtype: str = "auto",
        storage: str | None = None,
        task: str | None = None,
        images: Sequence[str] = (),
    ) -> None:
        first = adapters[0] if adapters else None
        _check_together(adapters, task)
        check_task(task, first)
        self.pictures = Pictures(images, base, first) if images else None
        self.model, tokenizer, opened = open_model(base, first, dtype=dtype, storage=storage)
        self.tasks = None if task is None else [task]
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        placed = [] if opened is None else [opened]
        placed += [load(self.model, each, name=f"adapter{n}", activate=False) for n, each in enumerate(adapters[1:], 2)]
        self.speakers = [
            _speaker(label, adapter.name, prompted(tokenizer, adapter), adapter.prompt_format, asking)
            for label, adapter in zip(adapters, placed, strict=True)
        ]
        if compare or not self.speakers:
            told = opened.prompt_format if opened is not None else None
            self.speakers.insert(0, _speaker("base", None, tokenizer, told, asking))
        self.speakers = [dataclasses.replace(speaker, pictures=self.pictures) for speaker in self.speakers]
        self._mixed = True

    def notes(self) -> list[str]:
        """Sentences about adapters that continue prompts as plain text because they were trained so."""
        return [
            f"{speaker.label} was trained on {speaker.trained_on}s, so the prompt is continued as it is; --chat puts "
            f"it into the chat template"
            for speaker in self.speakers
            if speaker.adapter is not None and speaker.trained_on is not None
        ]

    def answer(self, prompt: str, console: Console, *, before: Sequence[Sequence[Mapping[str, Any]]] = ()) -> list[str]:
        """Print and return the answer of each speaker to a prompt; `before` has the earlier messages of each."""
        histories = before or [()] * len(self.speakers)
        asked = [
            speaker.ids(self._asked(prompt, speaker, history))
            for speaker, history in zip(self.speakers, histories, strict=True)
        ]
        texts = self._complete([asked], batch=len(asked))[0]
        if len(texts) == 1:
            say(console, texts[0])
            return texts
        styles = iter(STYLES * len(texts))
        panels = [
            Panel(
                Text(visible(text)),
                title=Text(visible(speaker.label)),
                style="" if speaker.adapter is None else next(styles),
            )
            for speaker, text in zip(self.speakers, texts, strict=True)
        ]
        say(console, Columns(panels, equal=True, expand=True))
        return texts

    def _asked(self, prompt: str, speaker: Speaker, history: Sequence[Mapping[str, Any]]) -> str | Messages:
        """The text to continue, or the messages of the chat, with places for the images."""
        if self.pictures is not None:
            prompt = self.pictures.placed(prompt, history, raw=speaker.raw)
        return prompt if speaker.raw else [*history, {"role": "user", "content": prompt}]

    def loop(self, console: Console) -> None:
        """Read and answer prompts until an empty line or the end of input."""
        histories: list[list[Mapping[str, Any]]] = [[] for _ in self.speakers]
        say(console, "enter an empty line to quit", style="dim")
        while prompt := _read(console):
            for history, text in zip(histories, self.answer(prompt, console, before=histories), strict=True):
                asked = self.pictures.placed(prompt, history, raw=False) if self.pictures else prompt
                history += [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]

    def answers(self, questions: Sequence[Question], *, batch: int = 16, engine: bool = False) -> list[dict[str, str]]:
        """For each question, the answers by the labels of the speakers. `batch` is in prompts for a forward pass.

        With `engine`, the serving engine answers, greedily. It takes the adapters off the model, so nothing else can
        be asked afterwards.

        Raises DataError if a question is a chat and prompts are continued as plain text, if a chat template refuses it,
        or if it is empty.
        """
        problems: list[str] = []
        asked: list[list[list[int]]] = []
        for question in questions:
            try:
                asked.append([_ids(speaker, question) for speaker in self.speakers])
            except DataError as error:
                problems.extend(error.problems)
            except ValueError as error:
                problems.append(f"{question.source}: {error}")
        if problems:
            raise DataError(problems)
        labels = [speaker.label for speaker in self.speakers]
        texts = self._served(asked) if engine else self._complete(asked, batch=batch)
        return [dict(zip(labels, own, strict=True)) for own in texts]

    def _served(self, asked: Sequence[Sequence[list[int]]]) -> list[list[str]]:
        """What `_complete` returns, by the serving engine."""
        prompts = [ids for each in asked for ids in each]
        names = [speaker.adapter for speaker in self.speakers]
        folders = {speaker.adapter: speaker.label for speaker in self.speakers if speaker.adapter is not None}
        longest = max(map(len, prompts), default=0) + self.max_new_tokens
        with opened(self.model, self.speakers[0].tokenizer, folders, longest=longest) as engine:
            stops = [stop_tokens(engine.model, speaker.tokenizer) for speaker in self.speakers]
            texts = answers_of(
                engine, prompts, names * len(asked), max_new_tokens=self.max_new_tokens, stops=stops * len(asked)
            )
        return [texts[at : at + len(names)] for at in range(0, len(texts), len(names))]

    def _complete(self, asked: Sequence[Sequence[list[int]]], *, batch: int) -> list[list[str]]:
        """The texts of all speakers for each question, whose token ids differ by speaker.

        Adapters that cannot be in one batch answer one after the other, with the same texts.
        """
        found = [[""] * len(self.speakers) for _ in asked]
        groups = self._groups()
        while groups:
            group = groups.pop()
            places = [(q, s) for q in range(len(asked)) for s in group]
            try:
                texts = complete(
                    self.model,
                    self.speakers[group[0]].tokenizer,
                    [asked[q][s] for q, s in places],
                    batch=batch,
                    max_new_tokens=self.max_new_tokens,
                    tasks=self.tasks and self.tasks * len(places),
                    adapters=[self.speakers[s].adapter for _, s in places] if len(self.speakers) > 1 else None,
                    sampling=self.sampling,
                    more=self.pictures.inputs if self.pictures else None,
                )
            except ValueError:
                if len(group) == 1:
                    raise
                self._mixed = False
                groups += [[s] for s in group]
                continue
            for (q, s), text in zip(places, texts, strict=True):
                found[q][s] = text
        return found

    def _groups(self) -> list[list[int]]:
        """The speakers, by their places, whose prompts can be in one batch: those with one chat template."""
        found: dict[Any, list[int]] = {}
        for place, speaker in enumerate(self.speakers):
            found.setdefault(str(speaker.tokenizer.chat_template) if self._mixed else place, []).append(place)
        return list(found.values())


def _ids(speaker: Speaker, question: Question) -> list[int]:
    asked = question.asked
    if isinstance(asked, str) and question.prompt and not speaker.raw:
        asked = [{"role": "user", "content": asked}]
    if not isinstance(asked, str) and speaker.raw:
        raise ValueError("is a chat, and prompts are continued as plain text; leave out --raw, or pass --chat")
    found = speaker.ids(asked, question.variables)
    if not found:
        raise ValueError("the prompt is empty, so no answer can be generated")
    return found


def _speaker(
    label: str, name: str | None, tokenizer: PreTrainedTokenizerBase, told: PromptFormat | None, asking: Asking
) -> Speaker:
    """Raises ValueError for settings without effect, and without a chat template where one is needed."""
    trained_raw = told is not None and told.rows in ("completion", "text")
    raw = trained_raw if asking.raw is None else asking.raw
    if raw:
        given = {"--chat-template": asking.chat_template, "--system": asking.system, "--thinking": asking.thinking}
        if useless := [option for option, value in given.items() if value is not None]:
            more = "" if asking.raw else ", as the adapter was trained, or pass --chat"
            raise ValueError(f"{useless[0]}: prompts are continued as plain text{more}; leave it out")
        return Speaker(
            label, name, tokenizer, Frame(), True, told.rows if told is not None and asking.raw is None else None
        )
    if asking.chat_template is not None:
        text = chosen(asking.chat_template, tokenizer)
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = text
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template; add --raw to continue the prompt as plain text, or choose a template "
            "with --chat-template"
        )
    system = asking.system if asking.system is not None or told is None else told.system
    thinking = asking.thinking if asking.thinking is not None or told is None else told.thinking
    return Speaker(label, name, tokenizer, frame(tokenizer, system=system, thinking=thinking, key="--"), False)


def _check_together(adapters: Sequence[str], task: str | None) -> None:
    """Raise ValueError for several adapters that cannot answer side by side."""
    if len(adapters) < 2:
        return
    if task is not None:
        raise ValueError("--task is for one adapter; give one -a, or leave --task out")
    if twice := [each for each, count in Counter(adapters).items() if count > 1]:
        raise ValueError(f"{twice[0]}: is given twice; give each adapter once")
    prompts = [each for each in adapters if prompting_of(adapter_folder(each)) is not None]
    if prompts:
        raise ValueError(f"{prompts[0]}: prefix and prompt tuning cannot be used beside other adapters; give one -a")


def _read(console: Console) -> str:
    try:
        return console.input(Text("> ", "bold")).strip()
    except EOFError:
        return ""
