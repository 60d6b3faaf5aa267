"""The verb data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reparam.cli.config_options import with_options
from reparam.cli.options import ConfigFile, console
from reparam.errors import ConfigError, DataError


@with_options
def data(
    file: Annotated[
        str | None,
        typer.Argument(help="Rows: a file, a glob, a folder, a data set, or - for standard input.", show_default=False),
    ] = None,
    config: ConfigFile = None,
    rows: Annotated[int, typer.Option(min=0, help="Number of rows to show with their masks.")] = 3,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Folder for a plot of the lengths, lengths.png.")] = None,
    clear_cache: Annotated[
        bool, typer.Option("--clear-cache", help="Delete the cache of encoded rows (--data.cache), and nothing else.")
    ] = False,
    overrides: Any = None,
) -> None:
    """Show what training would make of a file of rows: lengths, masks, what is cut, duplicates, untrained tokens.

    Options of `train` apply; nothing is trained, and the base's weights are not loaded. The exit code is 2 if training
    would refuse the rows.

    [bold]reparam data rows.jsonl --base ./model --data.valid valid.jsonl[/bold]
    """
    from reparam.evaluation.terminal import note, say, say_json
    from reparam.io.outputs import check_files
    from reparam.recipes import data_show
    from reparam.recipes.data import studied
    from reparam.train.config import resolve

    if file is not None:
        if overrides.get("data.train", file) != file:
            raise ConfigError(f"two files of rows are given, {file} and {overrides['data.train']}; leave out --data")
        overrides["data.train"] = file
    resolved = resolve(config, overrides)
    if clear_cache:
        from reparam.core.text import counted, sized
        from reparam.io.outputs import user_cache
        from reparam.train.cache import clear

        if resolved.data.train:
            raise ConfigError("--clear-cache deletes the cache and studies no rows: leave out the rows")
        folder = Path(resolved.data.cache) if resolved.data.cache not in ("auto", "off") else user_cache("data")
        removed = clear(folder)
        say(console, f"{counted(len(removed), 'data set')} ({sized(sum(removed))}) deleted from {folder}")
        return
    if plot is not None:
        if not resolved.base.path:
            raise ConfigError("--plot shows lengths in tokens, which depend on the tokenizer: pass --base MODEL")
        check_files(plot, [data_show.PLOT], overwrite=resolved.run.fresh)
    done = studied(resolved)
    if plot is not None and done.study.lengths is not None:
        data_show.plot(done.study, plot / data_show.PLOT)
    if json:
        say_json(console, data_show.as_json(done, rows=rows))
    else:
        data_show.show(done, console, rows=rows)
        if plot is not None and done.study.lengths is not None:
            say(console, f"the plot is in {plot / data_show.PLOT}")
    if done.study.problems:
        if not json:
            say(console, note("refused", "training would refuse these rows, as the error says", "bold red"))
        raise DataError(done.study.problems)
