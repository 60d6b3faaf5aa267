"""Checkpoints of a run: written atomically, verified before use, with one run per folder.

A run folder holds `checkpoint-<step>` folders. Each is written under a hidden name, with `manifest.json` (size and
SHA-256 of every other file) as its last file, then flushed to disk and renamed. A checkpoint folder without a manifest,
or with a file that does not match it, is incomplete or was changed, and is not used.
"""

import dataclasses
import fcntl
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Any

from reparam.errors import DiskFull, FormatError, RunLocked
from reparam.io.native import read_json
from reparam.io.staged import digest, inside, locks, recover, staged_folder

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"^checkpoint-(\d+)$")


@dataclasses.dataclass(frozen=True)
class Found:
    """The checkpoint to resume from, and those that were skipped."""

    path: Path | None
    """The newest intact checkpoint, or None."""
    skipped: list[tuple[Path, str]]
    """Newer checkpoints that cannot be used, newest first, each with the reason."""


def commit(run_folder: str | os.PathLike[str], step: int, write: Callable[[Path], None]) -> Path:
    """Write the checkpoint of a step atomically; it replaces an existing checkpoint of the same step.

    Args:
        run_folder: created if it does not exist.
        step: number of completed optimizer steps.
        write: gets an empty folder and writes all files of the checkpoint into it, except the manifest.

    Returns the checkpoint's folder.

    Raises:
        DiskFull: the disk is full. The message names the newest checkpoint that is intact.
    """
    target = Path(run_folder) / f"checkpoint-{step}"
    try:
        with staged_folder(target, owned=True) as folder:
            write(folder)
            (folder / MANIFEST).write_text(json.dumps(_manifest(folder, step), indent=1) + "\n", encoding="utf-8")
    except DiskFull as error:
        kept = newest(run_folder).path
        state = f"{kept.name} is intact" if kept else "there is no older checkpoint"
        raise DiskFull(
            f"not enough disk space for {target} ({error.__cause__}): it was not saved, and {state}. "
            "Free some space and resume"
        ) from error
    return target


def verify(folder: str | os.PathLike[str]) -> list[str]:
    """Compare a checkpoint with its manifest. Returns one sentence per problem, or an empty list if it is intact."""
    path = Path(folder)
    if not path.is_dir():
        return ["it is not a folder" if path.exists() else "it does not exist"]
    if not (path / MANIFEST).exists():
        return [f"{MANIFEST} is missing: the checkpoint was not completed"]
    try:
        manifest = read_json(path / MANIFEST)
        step, files = manifest["step"], dict(manifest["files"])
        if manifest["format"] != FORMAT:
            return [f"{MANIFEST} has format {manifest['format']!r}, but this version reads only {FORMAT}"]
    except FormatError as error:
        return [str(error)]
    except (ValueError, TypeError, KeyError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"]
    match = _NAME.match(path.resolve().name)
    problems = [f"{MANIFEST} belongs to step {step!r}"] if match and int(match[1]) != step else []
    return problems + [problem for name, entry in files.items() for problem in _compare(path, name, entry)]


def newest(run_folder: str | os.PathLike[str]) -> Found:
    """Find the newest intact checkpoint, and the newer ones that had to be skipped."""
    skipped: list[tuple[Path, str]] = []
    for path in _checkpoints(run_folder):
        problems = verify(path)
        if not problems:
            return Found(path, skipped)
        skipped.append((path, "; ".join(problems)))
    return Found(None, skipped)


def resume_point(run_folder: str | os.PathLike[str], wish: str | os.PathLike[str] | bool | None) -> Found:
    """Choose the checkpoint that a run in this folder starts from, so that a folder never mixes two runs.

    Args:
        run_folder: the folder that the run will write to.
        wish: None or False for a new run, True for the newest intact checkpoint, or the path of a checkpoint.

    Returns the checkpoint (`path` is None for a new run) and the checkpoints that were skipped.

    Raises:
        ValueError: the folder already has checkpoints of another run; there is no checkpoint to resume from; or the
            requested checkpoint is damaged or is not the newest intact one in the folder.
    """
    found = newest(run_folder)
    if wish is None or wish is False:
        there = [path for path, _ in found.skipped] + ([found.path] if found.path else [])
        if there:
            raise ValueError(
                f"{run_folder} already holds {there[0].name} of another run: resume from it, choose another folder, "
                "or delete its checkpoints"
            )
        return found
    path = found.path if wish is True else Path(wish)
    if path is None:
        reasons = "".join(f"\n  {skipped.name}: {reason}" for skipped, reason in found.skipped)
        raise ValueError(f"{run_folder} holds no checkpoint to resume from{':' if reasons else ''}{reasons}")
    if problems := verify(path):
        raise ValueError(f"cannot resume from {path}: {'; '.join(problems)}")
    if found.path is not None and found.path.resolve() != path.resolve():
        raise ValueError(
            f"cannot resume from {path}, because {found.path} is the newest checkpoint of the run: resume from the "
            "newest one, or delete all newer checkpoints first"
        )
    return Found(path, found.skipped)


def prune(run_folder: str | os.PathLike[str], keep: int, *, protect: Collection[Path] = ()) -> list[Path]:
    """Delete old checkpoints; keep the newest intact one, the `keep - 1` before it, and those in `protect`.

    Damaged checkpoints that are newer than the newest intact one are kept. Without an intact checkpoint, nothing is
    deleted. Each checkpoint is renamed to a hidden name first, so that readers never see a part of it. Returns the
    paths of the deleted checkpoints.
    """
    assert keep >= 1, keep
    good = newest(run_folder).path
    if good is None:
        return []
    older = [path for path in _checkpoints(run_folder) if step_of(path) < step_of(good)]
    committed = [path for path in older if (path / MANIFEST).is_file()]
    kept = {path.resolve() for path in [*committed[: keep - 1], *protect]}
    doomed = [path for path in older if path.resolve() not in kept]
    for path in doomed:
        hidden = path.with_name(f".{path.name}.reparam-new-{os.urandom(6).hex()}")
        os.rename(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    return doomed


class RunLock:
    """An exclusive lock on a run folder: `with RunLock(folder): ...`.

    The operating system releases the lock when the process ends, even if it is killed. Acquiring the lock removes
    unfinished files of a killed run. The same object can be entered again inside its own block.

    Raises:
        RunLocked: another run, or another RunLock of this process, has locked the folder.
    """

    def __init__(self, run_folder: str | os.PathLike[str]) -> None:
        self.folder = Path(run_folder)
        self._handle: int | None = None
        self._depth = 0
        # A forked child (a worker of a data loader) inherits the lock and can outlive a killed parent.
        os.register_at_fork(after_in_child=self._close)

    def __enter__(self) -> "RunLock":
        if self._handle is None:
            self._handle = self._take()
            recover(self.folder)
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._close()

    def _take(self) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        # The file is never deleted: otherwise two processes could lock two different files of this name.
        handle = locks(self.folder / ".lock")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise RunLocked(
                f"{self.folder} is in use by {owner}: wait until it ends, or choose another folder"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        return handle

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def step_of(path: Path) -> int:
    """The number of completed steps in the name of a checkpoint's folder."""
    match = _NAME.match(path.name)
    assert match is not None, path
    return int(match[1])


def _checkpoints(run_folder: str | os.PathLike[str]) -> list[Path]:
    """All `checkpoint-<step>` folders, newest first."""
    root = Path(run_folder)
    found = [path for path in (root.iterdir() if root.is_dir() else ()) if _NAME.match(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def _manifest(folder: Path, step: int) -> dict[str, Any]:
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    assert MANIFEST not in files, "the manifest is written last, by commit"
    entries = {name: {"size": path.stat().st_size, "sha256": digest(path)} for name, path in files.items()}
    return {"format": FORMAT, "step": step, "files": entries}


def _compare(folder: Path, name: str, entry: Any) -> list[str]:
    try:
        path = inside(folder, name)
        size, sha256 = entry["size"], entry["sha256"]
    except (ValueError, TypeError, KeyError) as error:
        return [f"{MANIFEST} has a bad entry for {name!r} ({error})"]
    if not path.is_file():
        return [f"{name} is missing"]
    found = path.stat().st_size
    if found != size:
        return [f"{name} has {found} bytes instead of {size}"]
    try:
        same = digest(path) == sha256
    except OSError as error:
        return [f"{name} cannot be read ({error})"]
    return [] if same else [f"{name} was changed after it was saved (its SHA-256 differs)"]
