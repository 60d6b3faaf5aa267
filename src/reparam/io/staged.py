"""How results are written: staged beside the target, flushed to the disk, then renamed. Half of a result is never seen.

A target `T` is staged as `.T.reparam-new-<token>` in the same folder, every file and folder of it is flushed (fsync),
and a rename puts it in place. A file, or a folder that did not exist or was empty, goes in by one rename: readers see
the old state or the new one. A folder that holds something takes two: the old one is renamed to
`.T.reparam-old-<token>`, the new one to `T`, and the old one is deleted. What a reader sees when the process dies
(kill, power cut) at each point:

| killed                                | `T` is      | left over          | `recover` then                |
|---------------------------------------|-------------|--------------------|-------------------------------|
| while staging                         | the old one | part of the new    | deletes the part              |
| between the two renames               | absent      | old and new, whole | puts the old one back         |
| after both, while the old is deleted  | the new one | part of the old    | deletes the part              |

`recover` runs before every write to the same target, and when a run folder is locked. A writer holds a lock on what it
stages, which vanishes with its process: that is how the work of a dead writer is told from that of a live one.
An error or an interrupt in Python cleans up at once. POSIX only.
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from reparam.errors import DiskFull

_LEFTOVER = re.compile(r"^\.(?P<name>.+)\.reparam-(?P<kind>new|old)-(?P<token>[0-9a-f]{12})$")
# EFBIG: the limit on the size of a file, which is how `ulimit -f` and some file systems say that there is no room.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, or leave what was there.

    The parent folder is made if it is missing. A symbolic link is followed: the file it points to is replaced.

    Raises:
        DiskFull: there was no room; the old content is intact.
        OSError: anything else that the system refuses; the old content is intact.
    """
    target = _prepare(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: a file cannot be written in its place")
    staged = _name(target, "new", secrets.token_hex(6))
    with _complain_if_full(target):
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
    """Give an empty folder to write into, which becomes `target` if the block ends without an error.

    The parent folder is made if it is missing. A symbolic link is followed: the folder it points to is replaced.

    Args:
        target: the folder to make or to replace as a whole.
        owned: whether files that `target` holds and the new content lacks may be deleted. By default that is an
            error, so that naming a folder with other things in it costs nothing.

    Raises:
        DiskFull: there was no room; the old folder is intact.
        FileExistsError: `target` is a file, or holds files that would be lost (see `owned`).
        OSError: anything else that the system refuses; the old folder is intact.

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
        raise FileExistsError(f"{path} is a file: a folder cannot be written in its place")
    token = secrets.token_hex(6)
    staged, aside = _name(path, "new", token), _name(path, "old", token)
    with _complain_if_full(path):
        staged.mkdir()
        try:
            with _held(staged):
                yield staged
                if not owned:
                    _refuse_loss(path, staged)
                _flush_tree(staged)
                _swap(staged, path, aside)
        finally:
            # After the swap neither name exists and this does nothing.
            shutil.rmtree(staged, ignore_errors=True)
            _settle(path, aside)


def recover(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Undo or finish what writers that died left in `folder`, for the target `name` or for all targets in it."""
    place = Path(folder)
    for entry in list(place.iterdir()) if place.is_dir() else []:
        match = _LEFTOVER.match(entry.name)
        if match is None or (name is not None and match["name"] != name):
            continue
        target = place / match["name"]
        staged = _name(target, "new", match["token"])
        if _in_use(staged if staged.exists() else entry):
            continue
        if match["kind"] == "old":
            _settle(target, entry)
        else:
            # An old one that waits beside it goes back first: between the two renames both are there.
            _settle(target, _name(target, "old", match["token"]))
            _remove(entry)


def inside(folder: str | os.PathLike[str], name: str) -> Path:
    """Return `folder / name`, for a `name` that was read from a file and is not to be trusted.

    Raises:
        ValueError: the path leaves the folder: absolute, through `..`, or through a symbolic link.
    """
    root = Path(os.path.realpath(folder))
    path = Path(os.path.realpath(root / name))
    if path == root or not path.is_relative_to(root):
        raise ValueError(f"{folder}: the file name {name!r} leads out of the folder, and is not followed")
    return path


def digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(target: Path, kind: str, token: str) -> Path:
    return target.with_name(f".{target.name}.reparam-{kind}-{token}")


def _prepare(target: str | os.PathLike[str]) -> Path:
    """Return the real path of a target, its parent made and freed of what dead writers left."""
    path = Path(os.path.realpath(target))
    missing = [parent for parent in path.parents if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir(exist_ok=True)
        _flush(parent.parent)
    recover(path.parent, path.name)
    return path


def _swap(staged: Path, path: Path, aside: Path) -> None:
    """Rename `staged` to `path`; a folder that is there and not empty goes to `aside` first."""
    while True:
        try:
            os.rename(staged, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            _flush(path.parent)
            return
        # Twice only if another writer put its own folder there in between: both are whole, and the later one wins.
        _remove(aside)
        with suppress(FileNotFoundError):
            os.rename(path, aside)


def _settle(path: Path, aside: Path) -> None:
    """Put the old folder back where nothing took its place; delete it where something did."""
    if not aside.exists():
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
            f"{old} holds files that are not part of the result and would be deleted with it ({names}): "
            "choose another folder, or move them away. Nothing was changed"
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Make the system write a file's content, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            if not os.path.islink(os.path.join(root, name)):
                _flush(Path(root, name))
        _flush(Path(root))


@contextmanager
def _held(staged: Path) -> Iterator[None]:
    """Hold a lock on what is being staged, so that others see that its writer lives."""
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


@contextmanager
def _complain_if_full(target: Path) -> Iterator[None]:
    """Turn the ways in which a full disk shows itself into one error that says what is left."""
    existed = target.exists()
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if not _no_room(error):
            raise
        kept = "what was there before is intact" if existed else "nothing was left there"
        raise DiskFull(
            f"no room on the disk to write {target} ({error}): {kept}. Free some space and try again"
        ) from error


def _no_room(error: BaseException | None) -> bool:
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return True
    # safetensors gives the system's error number in the text only.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return (found is not None and int(found[1]) in _NO_ROOM) or _no_room(error.__cause__)
