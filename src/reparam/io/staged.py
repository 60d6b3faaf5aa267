"""Atomic writes: stage the result next to the target, flush it to disk, then rename it.

A target `T` is staged as `.T.reparam-new-<token>` in the same folder. All its files and folders are flushed (fsync),
and a rename moves it into place. A file, or a folder that did not exist or was empty, needs one rename: readers see
the old state or the new one. A folder that is not empty needs two: the old folder is renamed to
`.T.reparam-old-<token>`, the new one to `T`, and the old one is deleted. If the process dies (kill, power loss), the
state depends on the point:

| killed                                | `T` is      | left over          | `recover` then                |
|---------------------------------------|-------------|--------------------|-------------------------------|
| while staging                         | the old one | part of the new    | deletes the part              |
| between the two renames               | absent      | old and new, whole | puts the old one back         |
| after both, while the old is deleted  | the new one | part of the old    | deletes the part              |

`recover` runs before every write to the same target, and when a run folder is locked. A writer holds a file lock on its
staged files. The lock disappears with the process, so `recover` can tell leftovers of a dead writer from the files of a
running one. After an exception, an interrupt or SIGTERM, the cleanup is immediate. Only regular files and folders are
taken for leftovers. POSIX only.
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from reparam.errors import WriteFailed
from reparam.io.failures import ended_by_sigterm, explained

_LEFTOVER = re.compile(r"^\.(?P<name>.+)\.reparam-(?P<kind>new|old)-(?P<token>[0-9a-f]{12})$")


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` atomically.

    Creates missing parent folders. Follows a symbolic link and replaces the file that it points to.

    Raises:
        DiskFull: there is not enough space; the old content is intact.
        WriteFailed: another failure of the operating system; the old content is intact.
    """
    target = _prepare(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder and cannot be replaced by a file; choose another path")
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{target} is not a regular file and cannot be replaced; choose another path")
    staged = _name(target, "new", secrets.token_hex(6))
    with explained(target), ended_by_sigterm():
        handle = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(staged, target)
            _flush(target.parent)
        finally:
            staged.unlink(missing_ok=True)


@contextmanager
def staged_folder(target: str | os.PathLike[str], *, owned: bool = False) -> Iterator[Path]:
    """Yield an empty folder to write into. It becomes `target` if the block ends without an exception.

    Creates missing parent folders. Follows a symbolic link and replaces the folder that it points to.

    Args:
        target: the folder to create, or to replace as a whole.
        owned: whether to delete files of `target` that the new content lacks. By default such files cause a
            FileExistsError, so that naming a wrong folder deletes nothing.

    Raises:
        DiskFull: there is not enough space; the old folder is intact.
        FileExistsError: `target` is a file, or holds files that would be deleted (see `owned`).
        WriteFailed: another failure of the operating system; the old folder is intact.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with staged_folder(f"{place}/result") as folder:
        ...         _ = (folder / "a.txt").write_text("1")
        ...     sorted(os.listdir(place)), sorted(os.listdir(f"{place}/result"))
        (['result'], ['a.txt'])
    """
    path = _prepare(target)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file and cannot be replaced by a folder; choose another path")
    token = secrets.token_hex(6)
    staged, aside = _name(path, "new", token), _name(path, "old", token)
    with explained(path), ended_by_sigterm():
        try:
            staged.mkdir()
            with _held(staged):
                yield staged
                if not owned:
                    _refuse_loss(path, staged)
                _finish_tree(staged)
                _swap(staged, path, aside)
        finally:
            # After a successful swap neither path exists, and this does nothing.
            shutil.rmtree(staged, ignore_errors=True)
            _settle(path, aside)


def recover(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Undo or finish interrupted writes in `folder`, of the target `name` or of all targets.

    Does nothing to the staged files of running writers.
    """
    place = Path(folder)
    for entry in list(place.iterdir()) if place.is_dir() else []:
        match = _LEFTOVER.match(entry.name)
        if match is None or (name is not None and match["name"] != name) or not _ours(entry):
            continue
        target = place / match["name"]
        staged = _name(target, "new", match["token"])
        if _in_use(staged if staged.exists() else entry):
            continue
        if match["kind"] == "old":
            _settle(target, entry)
        else:
            # Restore the old folder first, if there is one: between the two renames both are present.
            _settle(target, _name(target, "old", match["token"]))
            _remove(entry)


def between_renames(folder: Path) -> bool:
    """Whether a writer that replaces this folder has moved the old one away, and not yet the new one into place."""
    place = Path(os.path.realpath(folder))
    names = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
    matches = [match for match in map(_LEFTOVER.match, names) if match is not None and match["name"] == place.name]
    staged = [_name(place, "new", match["token"]) for match in matches if match["kind"] == "old"]
    return any(_ours(new) and _in_use(new) for new in staged)


def inside(folder: str | os.PathLike[str], name: str) -> Path:
    """Return `folder / name` for an untrusted `name`, such as one from a file.

    Raises:
        ValueError: the path leads out of the folder: it is absolute, or uses `..` or a symbolic link.
    """
    root = Path(os.path.realpath(folder))
    path = Path(os.path.realpath(root / name))
    if path == root or not path.is_relative_to(root):
        raise ValueError(f"{folder}: the file name {name!r} leads out of the folder, so it is not followed")
    return path


def locks(file: Path) -> int:
    """Open a file to lock it, created if absent; the handle, to read and write it.

    Raises WriteFailed for anything but a regular file of one name: what is written must not go through a link.
    """
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise WriteFailed(f"{file}: cannot be opened to lock it: {error.strerror}; delete it") from error
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(handle)
        raise WriteFailed(f"{file}: is a link or not a regular file; delete it")
    return handle


def digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal. Raises OSError, with the path, if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from None  # reading names no file


def _name(target: Path, kind: str, token: str) -> Path:
    return target.with_name(f".{target.name}.reparam-{kind}-{token}")


def _prepare(target: str | os.PathLike[str]) -> Path:
    """Return the real path of a target, after creating its parent folder and recovering interrupted writes there."""
    path = Path(os.path.realpath(target))
    with explained(path):
        missing = [parent for parent in path.parents if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir(exist_ok=True)
            _flush(parent.parent)
        recover(path.parent, path.name)
    return path


def _swap(staged: Path, path: Path, aside: Path) -> None:
    """Rename `staged` to `path`; if `path` is a folder that is not empty, rename that to `aside` first."""
    while True:
        try:
            os.rename(staged, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            _flush(path.parent)
            return
        # The loop repeats only if another writer puts its folder there meanwhile. Both are complete; the last one wins.
        _remove(aside)
        with suppress(FileNotFoundError):
            os.rename(path, aside)


def _settle(path: Path, aside: Path) -> None:
    """Rename the old folder `aside` back to `path` if `path` does not exist; otherwise delete it."""
    if not _ours(aside):
        return
    if path.exists():
        _remove(aside)
    else:
        os.rename(aside, path)
        _flush(path.parent)


def _refuse_loss(old: Path, new: Path) -> None:
    files = [file.relative_to(old) for file in old.rglob("*") if not file.is_dir()]
    lost = sorted(str(file) for file in files if not os.path.lexists(new / file))
    if lost:
        names = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        raise FileExistsError(
            f"{old} holds files that are not part of the result and would be deleted ({names}), so nothing was "
            "written; choose another folder, or move these files away"
        )


def _ours(path: Path) -> bool:
    """Whether this is a regular file or a folder, as writers leave them behind; opening anything else may block."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _finish_tree(folder: Path) -> None:
    """Give the files the permissions that new files get, which some libraries do not, and flush all to disk."""
    mode = stat.S_IMODE(os.stat(folder).st_mode) & 0o666  # the folder is new, so its mode follows the umask
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            if not os.path.islink(os.path.join(root, name)):
                os.chmod(os.path.join(root, name), mode)
                _flush(Path(root, name))
        _flush(Path(root))


@contextmanager
def _held(staged: Path) -> Iterator[None]:
    """Hold a lock on the staged folder, which tells other processes that its writer is running."""
    handle = os.open(staged, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _in_use(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
