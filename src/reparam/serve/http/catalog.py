"""The models that requests can name: the base, the adapters below one folder, and exact sums of them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path
from typing import Any

from reparam.core.checks import nearest
from reparam.errors import FormatError, UnknownAdapter
from reparam.io.prompt_format import PromptFormat
from reparam.serve.engine import Engine
from reparam.serve.http.blends import Blends, is_made, is_sum, terms
from reparam.serve.http.errors import Problem
from reparam.serve.http.settings import Settings
from reparam.serve.inside import outside
from reparam.serve.store import check_name


@dataclasses.dataclass(frozen=True)
class Model:
    """What answers a request."""

    label: str
    """What the request calls it."""
    adapter: str | None
    """The engine's name of the adapter; None for the base."""
    prompt_format: PromptFormat | None = None
    """How the adapter was trained to be asked."""


class Catalog:
    """The models of an engine."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._blends = Blends(engine, engine.folder_of)
        self._loading = asyncio.Lock()
        self._begun = int(time.time())
        if odd := [name for name in engine.adapters if is_made(name)]:
            raise ValueError(f"an adapter is named {odd[0]}, which is a name for sums; give its folder another name")
        if settings.name in engine.adapters:
            raise ValueError(
                f"the base and an adapter are both named {settings.name}; give the base another name with --name"
            )

    async def find(self, name: str) -> Model:
        """The model of this name. Raises UnknownAdapter if there is none, and FormatError if it cannot be served."""
        if name == self._settings.name:
            return Model(name, None)
        parts = terms(name) if is_sum(name) else {name: 1.0}
        for part in parts:
            if part not in self.adapters():
                known = [self._settings.name, *self.adapters()]
                hint = nearest(part[:128], known)
                raise UnknownAdapter(f"no model is named {part[:128]!r}{hint}; /v1/models lists them")
        try:
            adapter = await self._blends.find(parts) if is_sum(name) else name
            return Model(name, adapter, (await self._engine.look(adapter)).prompt_format)
        except FormatError as error:
            raise self.without_folder(error) from None

    def adapters(self) -> list[str]:
        """The names of the adapters."""
        return [name for name in self._engine.adapters if not is_made(name)]

    def listed(self) -> list[dict[str, Any]]:
        """The models, as /v1/models shows them; the digest is that of an adapter that has been used."""
        base, digests = self._settings.name, self._engine.digests()
        found = [self._entry(base, root=base, parent=None, digest=None)]
        return found + [self._entry(n, root=n, parent=base, digest=digests.get(n)) for n in self.adapters()]

    async def load(self, name: str, path: str, *, replace: bool) -> str:
        """Read the adapter in a folder below that of the adapters; its digest. Raises Problem, and FormatError."""
        folder = self._inside(path)
        try:
            check_name(name)
        except ValueError as error:
            raise Problem(400, f"lora_name: {error}", param="lora_name") from None
        async with self._loading:
            if name == self._settings.name or is_made(name):
                raise Problem(409, f"{name} is the name of another model; give another one", param="lora_name")
            if name in self.adapters() and not replace:
                raise Problem(
                    409,
                    f"an adapter is named {name} already; set load_inplace to true to replace it, or unload it first",
                    code="name_in_use",
                    param="lora_name",
                )
            try:
                return await asyncio.to_thread(self._engine.load, name, folder)
            except FormatError as error:
                raise self.without_folder(error, "lora_path") from None

    async def unload(self, name: str) -> None:
        """Forget an adapter. Raises Problem 404 if no adapter has this name."""
        async with self._loading:
            if name not in self.adapters():
                raise Problem(404, f"no adapter is named {name[:128]!r}", code="model_not_found", param="lora_name")
            self._engine.unload(name)

    def close(self) -> None:
        """Delete the files of sums."""
        self._blends.close()

    def without_folder(self, error: Exception, param: str = "model") -> Problem:
        """Why an adapter cannot be served, without the place of its folder on this machine."""
        told = str(error)
        root = self._settings.root
        for place in () if root is None else (root.resolve(), root.absolute()):
            told = told.replace(f"{place}/", "").replace(str(place), "the folder of the adapters")
        return Problem(400, told[:1000], code="adapter_refused", param=param)

    def _inside(self, path: str) -> Path:
        """A folder below that of the adapters. Raises Problem 403 for any other path."""
        root = self._settings.root
        if root is None:
            raise Problem(403, "the server was started without --adapters, so it can load none", code="no_adapters")
        try:
            real = root.resolve()
            folder = (real / path).resolve()
            if not folder.is_relative_to(real) or folder == real:
                raise Problem(
                    403,
                    "lora_path is not below the folder of the adapters; give the name of a folder in it",
                    code="outside",
                    param="lora_path",
                )
            if outside(folder, real) is not None:
                raise Problem(
                    403,
                    "lora_path holds links that lead out of the folder of the adapters",
                    code="outside",
                    param="lora_path",
                )
            if not folder.is_dir():
                raise Problem(404, "there is no such folder", code="no_such_folder", param="lora_path")
        except (OSError, ValueError):
            raise Problem(400, "lora_path is no path of a folder", param="lora_path") from None
        return folder

    def _entry(self, name: str, *, root: str, parent: str | None, digest: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._begun,
            "owned_by": "reparam",
            "root": root,
            "parent": parent,
            "digest": digest,
        }
