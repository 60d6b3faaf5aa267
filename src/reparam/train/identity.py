"""What determines the result of a run: its settings, and the content of its data, its base and the tokenizer.

`run.json` in the run folder holds them. A run goes on in a folder only if they are the same as before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reparam.core.checks import listed
from reparam.core.progress import tracked
from reparam.data.files import files_of
from reparam.errors import ConfigError, FormatError
from reparam.hf.models import check_not_base
from reparam.io.files import adapter_folder
from reparam.io.native import read_json
from reparam.io.outputs import OVERWRITE, check_writable
from reparam.io.staged import digest, inside, write_file
from reparam.sites.fingerprint import all_tensors
from reparam.train import processes
from reparam.train.cache import content_of
from reparam.train.config import PATHS, Config, dump, tables
from reparam.train.loggers import EVENTS
from reparam.train.reward import code_of

if TYPE_CHECKING:
    from torch import nn

    from reparam.train.job import Job

RECORD, SETTINGS = "run.json", "config.toml"
STEPS, EARLIER = "number of steps", "earlier numbers of steps"
# Keys that may change when a run goes on: they do not change the adapter. Paths are compared by their content.
FREE = {
    *(
        "run.output",
        "run.resume",
        "run.fresh",
        "run.keep",
        "run.save_every",
        "run.eval_every",
        "run.log_every",
        "run.loggers",
        "run.samples",
        "run.name",
    ),
    *(
        "run.max_steps",
        "run.epochs",
        "data.score_rows",
        "data.cache",
        "data.cache_limit",
        "data.workers",
        "optim.budget",
        "optim.page",
    ),
    *("base.revision", "prefer.reward", *PATHS),
}
ENDS = 1 << 20  # bytes at both ends of a streamed file whose digest stands for its content
BY_EVALUATION = {"run.eval_every", "run.save_every"}
"""Keys that change the adapter if the run ends with its best weights."""


def identity(job: Job) -> dict[str, Any]:
    """The settings and the digests that determine the result of a run, by name, as JSON values."""
    config = job.config
    free = FREE - (BY_EVALUATION if config.run.keeps_best else set())
    if config.data.streaming:
        free = free | {"data.bad_rows"}  # a bad row that is met during a run must not end it for good
    found = {key: value for key, value in settings_of(config).items() if key not in free}
    found[STEPS] = config.run.steps(len(job.drawn), processes.count())
    found["number of processes"] = processes.count()
    found["content of base.path"] = _weights(job.model)
    found["content of the tokenizer"] = content_of(job.tokenizer)
    found["content of the chat template"] = _text(job.tokenizer.chat_template)
    for key, names, rows in (
        ("train", config.data.sources(), job.train),
        ("valid", config.data.sources("valid"), job.valid),
    ):
        if key == "train" and config.data.streaming:
            found["content of data.train"] = _streamed(names)
            continue
        # Other sources have no digest of their own; their examples depend on the tokenizer and on max_length, too.
        of_files = [digest(name) for name in names] if all(Path(name).is_file() for name in names) else None
        content = rows.digest() if of_files is None else of_files[0] if len(of_files) == 1 else of_files
        found[f"content of data.{key}"] = content or None
    found["content of prefer.reward"] = code_of(config.prefer.reward) if config.prefer.reward else None
    start = config.adapter.start
    found["content of adapter.start"] = _folder(adapter_folder(start)) if start is not None else None
    found["content of method.experts"] = [_folder(adapter_folder(path)) for path in config.method.expert_folders]
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def check_folder(config: Config) -> None:
    """Raise if the run cannot use its output folder; this reads no data and no model.

    Raises ValueError if it is the folder of the base or a run would write through a link out of it, WriteFailed if it
    cannot be written, and ConfigError if it holds files but no run; with `run.fresh`, only if the run would replace
    these files.
    """
    folder = Path(config.run.output)
    check_not_base(folder, config.base.path)
    file = folder / SETTINGS
    held = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    own = dump(config).encode()
    if file.is_file() and file.stat().st_size == len(own) and file.read_bytes() == own:
        held.remove(SETTINGS)  # `reparam compare` writes it before a run
    for name in [] if config.run.fresh else filter(_written, held):
        inside(folder, name)
    foreign = [name for name in held if not name.startswith(".") and (not config.run.fresh or _written(name))]
    if foreign and RECORD not in held:
        raise ConfigError(
            f"{folder} holds files ({listed(foreign, shown=3)}) but no {RECORD}, so it is not the folder of an earlier "
            f"run; choose another run.output"
        )
    check_writable(folder, inside=True)


def check_same(folder: Path, now: dict[str, Any], *, longer: bool) -> None:
    """Raise ConfigError, with every difference by its key, if the folder holds a run with another identity.

    If `longer` is true, the run may have more steps than before.
    """
    file = folder / RECORD
    if not file.is_file():
        return
    then = _defaults() | _read(file)["identity"]
    changed = [key for key in now if key in then and then[key] != now[key]]
    if longer and STEPS in changed and now[STEPS] > then[STEPS]:
        changed.remove(STEPS)
    if changed:
        lines = "; ".join(_difference(key, then[key], now[key]) for key in changed)
        raise ConfigError(
            f"{folder} holds a run with other settings: {lines}; to continue it, set {', '.join(changed)} as before, "
            f"choose another run.output for a new run, or pass {OVERWRITE} to delete the earlier run"
        )


def _defaults() -> dict[str, Any]:
    """The default values of the keys that a record of an earlier version may lack."""
    own = {key: value for key, value in settings_of(Config()).items() if key not in FREE}
    found: dict[str, Any] = json.loads(json.dumps(own))
    return {key: value for key, value in found.items() if not key.startswith(("base.", "method."))}


def write_record(folder: Path, now: dict[str, Any]) -> int:
    """Write the identity of a run into its folder, with the numbers of steps that it had in earlier calls.

    Returns the number of steps that the run had in the call before, or the present one.
    """
    file, before = folder / RECORD, now[STEPS]
    earlier: list[int] = []
    if file.is_file():
        then = _read(file)
        before = then["identity"].get(STEPS, before)
        earlier = [*then.get(EARLIER, []), *([before] if before != now[STEPS] else [])]
    found = {"format": 1, "identity": now, **({EARLIER: earlier} if earlier else {})}
    write_file(file, (json.dumps(found, indent=1) + "\n").encode())
    return int(before)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = read_json(file)
        if not isinstance(found["identity"].get(STEPS, 0), int) or not isinstance(found.get(EARLIER, []), list):
            raise ValueError(f"{STEPS} is not a number")
    except FormatError as error:
        raise ConfigError(f"{error}; choose another run.output") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); choose another run.output") from None
    return found


def clear(folder: Path) -> None:
    """Delete what a run wrote into its folder, and nothing else."""
    for entry in folder.iterdir():
        if not _written(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _written(name: str) -> bool:
    """Whether a run writes a file or folder of this name into its folder."""
    own = (RECORD, SETTINGS, EVENTS, "adapter", "vora", "figures.json", "loss.png")
    return name in own or (name.startswith("checkpoint-") and name.removeprefix("checkpoint-").isdecimal())


def _difference(key: str, then: Any, now: Any) -> str:
    if key.startswith("content of "):
        return f"the {key} has changed"
    if key == "optim.lora_plus" and then and now:
        return f"{key}: the group out had {then:g} times the learning rate and now has {now:g} times"
    fewer = ", but a run cannot have fewer steps than before" if key == STEPS and now < then else ""
    planned = ", but the method has a schedule for its number of steps" if key == STEPS and now > then else ""
    return f"{key} was {then!r} and is now {now!r}{fewer}{planned}"


def settings_of(config: Config) -> dict[str, Any]:
    """The settings of a run by key, such as optim.learning_rate."""
    return {f"{section}.{key}": value for section, table in tables(config).items() for key, value in table.items()}


def _weights(model: nn.Module) -> str:
    """Digest of the base's tensors, computed before training. Adapters on the model are left out."""
    found = hashlib.sha256()
    tensors = sorted(all_tensors(model), key=lambda pair: pair[0])
    for name, tensor in tracked(tensors, "identifying the base", unit="tensors"):
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{name} {list(plain.shape)} {plain.dtype}".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _text(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _folder(folder: Path) -> str:
    parts = [f"{file.relative_to(folder)} {digest(file)}" for file in sorted(folder.rglob("*")) if file.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _streamed(sources: tuple[str, ...]) -> list[Any]:
    """What stands for the content of streamed sources: of files, their sizes and digests of both ends."""
    return [_ends(files) if (files := files_of(name)) is not None else name for name in sources]


def _ends(files: list[Path]) -> list[list[Any]]:
    return [[size := file.stat().st_size, _ends_of(file, size)] for file in files]


def _ends_of(file: Path, size: int) -> str:
    if size <= 2 * ENDS:
        return digest(file)
    with file.open("rb") as opened:
        found = hashlib.sha256(opened.read(ENDS))
        opened.seek(-ENDS, os.SEEK_END)
        found.update(opened.read())
    return found.hexdigest()
