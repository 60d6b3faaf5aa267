"""The places where commands write: checks before anything is read or computed, and the user's caches."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from reparam.errors import WriteFailed
from reparam.io import head, prompt_format
from reparam.io.failures import reason
from reparam.io.files import FORMATS
from reparam.io.staged import inside as inside_of

OVERWRITE = "--overwrite_output_dir"
_MODEL = re.compile(
    r"(config|generation_config|(pre)?processor_config|tokenizer(_config)?|special_tokens_map|added_tokens|vocab"
    r"|model\.safetensors\.index)\.json|model(-\d+-of-\d+)?\.safetensors|chat_template\.jinja"
    r"|merges\.txt|vocab\.txt|\w+\.model"
)


def user_cache(kind: str) -> Path:
    """Where this kind of converted data is kept: $XDG_CACHE_HOME/reparam/kind, by default ~/.cache/reparam/kind."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reparam" / kind


def check_adapter_folder(output: Path, format: str, *, overwrite: bool) -> None:
    """Raise an error unless an adapter in this format can be written to `output`.

    Raises ValueError if the format is unknown, if `output` is a file, and if it is a folder that is not empty, unless
    `overwrite` is set and it holds an adapter in this format alone; and WriteFailed if it cannot be created.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: expected one of {', '.join(FORMATS)}")
    own = {FORMATS[format].CONFIG, FORMATS[format].WEIGHTS, prompt_format.FILE, head.FILE}
    check_replaceable(output, lambda entry: entry.name in own and entry.is_file(), overwrite=overwrite)


def check_model_folder(output: Path, *, overwrite: bool) -> None:
    """Raise an error unless a model can be written to `output`.

    Raises ValueError if `output` is a file, and if it is a folder that is not empty, unless `overwrite` is set and it
    holds the files of a model alone; and WriteFailed if it cannot be created.
    """
    check_replaceable(
        output, lambda entry: _MODEL.fullmatch(entry.name) is not None and entry.is_file(), overwrite=overwrite
    )


def check_files(folder: Path, names: Collection[str], *, overwrite: bool) -> None:
    """Raise ValueError if `folder` is a file or, unless `overwrite` is set, has files of these names.

    Raises WriteFailed if the files cannot be created.
    """
    _check_not_file(folder)
    held = [name for name in names if inside_of(folder, name).exists()]
    if held and not overwrite:
        raise ValueError(
            f"{folder}: holds {', '.join(sorted(held))}; give another folder, or replace these files with {OVERWRITE}"
        )
    check_writable(folder, inside=True)


def check_continued(folder: Path, names: Collection[str], what: str, *, ours: bool, fresh: bool) -> None:
    """Check the folder of a command that goes on where an earlier call stopped; `ours` tells that it is such a folder.

    Args:
        folder: the folder, which may be absent.
        names: the files and folders that the command writes there.
        what: the noun for what it holds, with an article.
        ours: whether an earlier call of the command wrote there.
        fresh: whether the caller deletes what an earlier call wrote (`clear`), and starts anew beside other files.

    Raises ValueError for a file, for a folder with other content, and for entries with `names` of another origin;
    WriteFailed if nothing can be written there.
    """
    _check_not_file(folder)
    held = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if held and not ours and not fresh:
        raise ValueError(
            f"{folder}: exists, is not empty and does not hold {what}; give a new folder, or pass {OVERWRITE} to write "
            f"beside what is there"
        )
    for name in held if not fresh else ():
        if name in names:
            inside_of(folder, name)
    foreign = [name for name in held if name in names and not ours]
    if foreign:
        raise ValueError(
            f"{folder}: holds {', '.join(foreign)}, but not {what}, which would replace these; give a new folder"
        )
    check_writable(folder, inside=True)


def clear(folder: Path, names: Collection[str]) -> None:
    """Delete the files and folders of these names in `folder`, where they exist."""
    for path in (folder / name for name in names):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_apart(output: Path, folders: Iterable[Path], what: str) -> None:
    """Raise ValueError if `output` is one of the folders or lies in one; `what` is the noun for them, with an article.

    Nothing that is read may be replaced, and a model inside an adapter's folder would keep it from being saved again.
    """
    target = output.resolve()
    for folder in (folder.resolve() for folder in folders):
        if target == folder or folder in target.parents:
            where = "is" if target == folder else "lies in"
            raise ValueError(f"{output}: {where} the folder of {what}; give another folder as output")


def check_writable(output: Path, *, inside: bool = False) -> None:
    """Raise WriteFailed if a folder cannot be created at `output`; with `inside`, if files cannot be created in it.

    An empty folder is created for a moment in the place that has to be writable.
    """
    target = Path(os.path.realpath(output))
    places = [target, *target.parents] if inside else target.parents
    place = next(parent for parent in places if os.path.lexists(parent))
    trial = place / f".{target.name}.reparam-new-{secrets.token_hex(6)}"
    try:
        os.mkdir(trial)
        os.rmdir(trial)
    except OSError as error:
        raise WriteFailed(
            f"{output}: nothing can be written there, because no folder can be created in {place}: {reason(error)}; "
            f"give another folder"
        ) from error


def check_replaceable(output: Path, own: Callable[[Path], bool], *, overwrite: bool) -> None:
    """Raise ValueError if `output` is a file or a folder that is not empty; WriteFailed if it cannot be created.

    With `overwrite`, a folder may hold entries for which `own` is true, and no others.
    """
    _check_not_file(output)
    held = sorted(output.iterdir()) if output.exists() else []
    foreign = [entry.name for entry in held if not own(entry)]
    if held and not overwrite:
        more = "" if foreign else f", or replace its content with {OVERWRITE}"
        raise ValueError(f"{output}: exists and is not empty; give a new folder{more}")
    if foreign:
        raise ValueError(
            f"{output}: holds other files ({', '.join(foreign[:3])}), which {OVERWRITE} would delete; give a new folder"
        )
    check_writable(output)


def _check_not_file(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: is a file; give a folder as output")
