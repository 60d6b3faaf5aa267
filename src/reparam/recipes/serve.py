"""Serve a base and its adapters over HTTP."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from rich.console import Console

from reparam.core.checks import listed
from reparam.core.registry import find_storage
from reparam.core.text import counted
from reparam.evaluation.terminal import say
from reparam.hf.models import load_base, load_tokenizer
from reparam.serve.engine import Engine
from reparam.serve.http.auth import check_host, is_loopback, read_keys
from reparam.serve.http.log import logged
from reparam.serve.http.run import bound, run
from reparam.serve.http.settings import LOCAL, Settings
from reparam.serve.limits import Limits


def serve(
    base: str,
    *,
    settings: Settings,
    limits: Limits,
    host: str,
    port: int,
    key_file: Path | None,
    dtype: str,
    storage: str | None,
    console: Console,
) -> int:
    """Serve until a signal. Returns the exit code.

    `settings` has no keys and hosts; they follow from `host`, `key_file` and the environment. Nothing is loaded before
    the address is known to be free.

    Raises ValueError for settings that exclude each other, a host that needs a key, and keys that cannot be used,
    OSError if the address is taken, BaseError if the base cannot be loaded, and FormatError if the folder of the
    adapters has none.
    """
    keys = read_keys(key_file)
    check_host(host, keys)
    hosts = None if keys or not is_loopback(host) else (*LOCAL, host.lower())
    root = settings.root and settings.root.absolute()  # errors for clients leave it out
    settings = dataclasses.replace(settings, keys=keys, hosts=hosts, root=root)
    if settings.root is None and settings.loading:
        raise ValueError("--allow-loading: adapters are loaded from the folder that --adapters gives; add it")
    made = find_storage(storage)() if storage is not None and storage != "dense" else None
    listener = bound(host, port)
    try:
        model, tokenizer = load_base(base, dtype=dtype, storage=made), load_tokenizer(base)
        with Engine(model, tokenizer, adapters=settings.root, limits=limits) as engine, logged():
            names = engine.adapters
            listing = f" ({listed(names)})" if names else ""
            say(
                console,
                f"serving {settings.name} with {counted(len(names), 'adapter')}{listing} "
                f"on {shown(host, listener.getsockname()[1])}",
            )
            say(console, "the page is at /, Ctrl-C stops", style="dim")
            return run(engine, settings, listener)
    finally:
        listener.close()


def name_of(base: str) -> str:
    """The name of a base in requests: that of its folder, or its id on the hub."""
    return Path(os.path.abspath(base)).name if os.path.isdir(base) else base


def shown(host: str, port: int) -> str:
    """The address of a server, as browsers take it.

    >>> shown("::1", 8000)
    'http://[::1]:8000'
    """
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
