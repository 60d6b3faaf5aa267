"""The adapters of an engine: read from folders when they are first used, known by the digest of their contents.

Names are aliases of digests. A name that gets new bytes means a new adapter, with a slot of its own; the old one keeps
its slot until the last request that uses it has left. All reading and writing is done by one worker thread.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

from reparam.core.checks import listed, nearest
from reparam.errors import FormatError, Unavailable, UnknownAdapter
from reparam.io.files import FORMATS, adapter_folder
from reparam.io.prompt_format import PromptFormat
from reparam.serve.banks import Banks
from reparam.serve.inside import check_inside
from reparam.serve.pace import Pace
from reparam.serve.proof import Proven, Prover
from reparam.serve.shelf import Shelf

PATIENCE = 60.0
"""Seconds that an adapter waits for others to leave, if those in use take all the memory for adapters."""


@dataclasses.dataclass(eq=False)
class Resident:
    """An adapter in the banks."""

    digest: str
    method: str
    slot: int
    nbytes: int
    prompt_format: PromptFormat | None = None
    leases: int = 0
    """The requests that use it. Only an adapter without any can lose its slot."""


class Store:
    """Which adapters there are, and which of them have slots.

    `quiet` gives contexts in which no step runs, and `busy` tells whether there are steps to compute.
    """

    def __init__(
        self,
        banks: Banks,
        prover: Prover,
        shelf: Shelf,
        budget: int,
        *,
        quiet: Callable[[], AbstractContextManager[None]],
        busy: Callable[[], bool],
    ) -> None:
        self._banks = banks
        self._prover = prover
        self._shelf = shelf
        self._budget = budget
        self._quiet = quiet
        self._busy = busy
        self._lock = threading.Condition()
        self._folders: dict[str, Path] = {}
        self._roots: set[Path] = set()
        """Folders of adapters. What is in one of them has no links out of it, whenever it is read."""
        self._named: dict[str, Resident] = {}
        """The adapters of names that have been used. Those that have lost their slot are not among `_residents`."""
        self._residents: dict[str, Resident] = {}
        """By digest, the least recently used first."""
        self.loads = 0
        """How often an adapter was put into the banks."""
        self._worker = ThreadPoolExecutor(1, "reparam-serve-store")

    def __len__(self) -> int:
        """The number of adapters that are ready."""
        return len(self._residents)

    def names(self) -> list[str]:
        """All names."""
        return list(self._folders)

    def digests(self) -> Mapping[str, str]:
        """The digest of each name that has been used."""
        return {name: resident.digest for name, resident in list(self._named.items())}

    def folder(self, name: str) -> Path:
        """The folder of an adapter. Raises UnknownAdapter if no adapter has this name."""
        with self._lock:
            self.check(name)
            return self._folders[name]

    def nbytes(self) -> int:
        """The bytes of the adapters that are ready."""
        with self._lock:
            return sum(resident.nbytes for resident in self._residents.values())

    def register(self, root: Path) -> None:
        """Let every adapter in a folder of `root` be used by the name of the folder.

        Raises FormatError if there is none, or a folder is a link that leads out of `root`.
        """
        if not root.is_dir():
            raise FormatError(f"{root}: no such folder of adapters")
        self._roots |= {root, root.resolve()}
        for folder in sorted(root.iterdir()):
            inside = adapter_folder(folder)
            if not any((inside / module.CONFIG).is_file() for module in FORMATS.values()):
                continue
            check_inside(folder, root)
            check_name(folder.name)
            self._folders[folder.name] = inside
        if not self._folders:
            raise FormatError(f"{root}: no adapter here; each one is a folder with adapter.json or adapter_config.json")

    def load(self, name: str, folder: Path) -> Future[str]:
        """Read an adapter, now, and use it by this name. The result is its digest.

        Requests that have begun keep the adapter that the name had before. If the new one is refused, nothing changes.
        """
        check_name(name)
        return self._worker.submit(self._load, name, adapter_folder(folder))

    def unload(self, name: str) -> None:
        """Forget a name. Requests that have begun end with the adapter. Raises UnknownAdapter if there is none."""
        with self._lock:
            self.check(name)
            del self._folders[name]
            self._named.pop(name, None)
        self._worker.submit(self._sweep)

    def check(self, name: object) -> None:
        """Raise UnknownAdapter unless an adapter has this name."""
        if name not in self._folders:
            known = listed(list(self._folders)) or "none"
            raise UnknownAdapter(f"no adapter is named {name!r}{nearest(str(name), self._folders)}; there are: {known}")

    def is_ready(self, name: str) -> bool:
        """Whether a lease of this adapter takes no time."""
        resident = self._named.get(name)
        return resident is not None and self._residents.get(resident.digest) is resident

    def acquire(self, name: str) -> Resident | Future[Resident]:
        """A lease of an adapter; a future, if it must be read first. Raises UnknownAdapter, never the base instead."""
        with self._lock:
            self.check(name)
            found = self._lease(name)
        return found or self._worker.submit(self._fetch, name)

    def release(self, resident: Resident) -> None:
        """Give a lease back."""
        with self._lock:
            resident.leases -= 1
            self._lock.notify_all()

    def close(self) -> None:
        """End the worker. Work that has not begun is given up."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _lease(self, name: str) -> Resident | None:
        if not self.is_ready(name):
            return None
        resident = self._named[name]
        resident.leases += 1
        self._residents[resident.digest] = self._residents.pop(resident.digest)
        return resident

    def _fetch(self, name: str) -> Resident:
        with self._lock:
            self.check(name)
            found, folder = self._lease(name), self._folders[name]
            before = self._named.get(name)
        if found is None:
            held = before and self._shelf.get(before.digest)
            found = self._put(held, folder) if held else self._read(folder)
            with self._lock:
                self._named[name] = found
        return found

    def _load(self, name: str, folder: Path) -> str:
        resident = self._read(folder)
        with self._lock:
            self._folders[name], self._named[name] = folder, resident
        self.release(resident)
        return resident.digest

    def _read(self, folder: Path) -> Resident:
        """Read an adapter and give it a slot, unless its contents have one. Returns a lease."""
        for root in self._roots:
            if folder.is_relative_to(root):
                check_inside(folder, root)
        with Pace(self._busy):
            proven = self._prover.prove(folder)
            self._shelf.put(proven)
            return self._put(proven, folder)

    def _put(self, proven: Proven, folder: Path) -> Resident:
        """Give an adapter a slot, unless its contents have one. Returns a lease.

        Without rests, because a request waits: to write the tables of an adapter that is in memory takes milliseconds.
        """
        with self._lock:
            held = self._residents.get(proven.digest)
            if held is not None:
                held.leases += 1
                return held
        need = self._banks.bytes_for(proven.contents)
        self._make_room(need, folder)
        taken = {resident.slot for resident in self._residents.values()}
        slot = next(number for number in range(len(taken) + 1) if number not in taken)
        self._banks.write(slot, proven.contents, self._quiet, more=self._expected(need))
        with self._lock:
            resident = Resident(proven.digest, proven.method, slot, need, proven.prompt_format, leases=1)
            self._residents[proven.digest] = resident
            self.loads += 1
        return resident

    def _expected(self, need: int) -> int:
        """How many further adapters of this size there can be at once."""
        with self._lock:
            others = len(self._folders) - len(self._residents) - 1
            free = self._budget - need - sum(resident.nbytes for resident in self._residents.values())
        return max(0, min(others, free // max(need, 1)))

    def _make_room(self, need: int, folder: Path) -> None:
        """Take slots from adapters that no request uses, until so many bytes are free."""
        if need > self._budget:
            raise FormatError(
                f"{folder}: needs {need:,} bytes, more than the {self._budget:,} for all adapters; raise "
                f"Limits.adapter_bytes"
            )
        with self._lock:
            if not self._lock.wait_for(lambda: self._pinned() + need <= self._budget, PATIENCE):
                raise Unavailable(
                    f"{folder}: the adapters in use take {self._pinned():,} of the {self._budget:,} bytes for "
                    f"adapters, which leaves no room for {need:,}; send the request again later, or raise "
                    f"Limits.adapter_bytes"
                )
            self._sweep()
            used = sum(resident.nbytes for resident in self._residents.values())
            for resident in list(self._residents.values()):
                if used + need > self._budget and not resident.leases:
                    self._drop(resident)
                    used -= resident.nbytes

    def _pinned(self) -> int:
        return sum(resident.nbytes for resident in self._residents.values() if resident.leases)

    def _sweep(self) -> None:
        """Drop adapters that no name means and no request uses. In the worker's thread, as all writing."""
        with self._lock:
            named = list(self._named.values())
            for resident in list(self._residents.values()):
                if not resident.leases and resident not in named:
                    self._drop(resident)

    def _drop(self, resident: Resident) -> None:
        del self._residents[resident.digest]
        self._banks.free(resident.slot)


def check_name(name: str) -> None:
    """Raise ValueError unless an adapter can have this name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise ValueError(
            f"{name!r} cannot be the name of an adapter: expected up to 128 letters, digits, '.', '_' and '-', with a "
            f"letter or digit first"
        )
