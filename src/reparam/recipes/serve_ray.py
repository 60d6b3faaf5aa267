"""Serve a base and its adapters over HTTP with several engines, on a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import threading

import ray
from ray import serve
from rich.console import Console

from reparam.core.text import counted
from reparam.evaluation.terminal import say
from reparam.hf.models import load_tokenizer
from reparam.recipes.serve import shown
from reparam.serve.http.auth import check_host
from reparam.serve.http.run import bound
from reparam.serve.ray import Plan, application
from reparam.serve.store import adapters_in

NAME = "reparam"


def serve_on_ray(plan: Plan, *, host: str, port: int, console: Console) -> int:
    """Serve until a signal. Returns the exit code: 0, or 130 after SIGINT.

    The cluster is that of the environment variable RAY_ADDRESS; without one, it is begun on this machine and ends with
    the server. Everything that can be checked is checked before anything is started.

    Raises ValueError for settings that exclude each other, and a host that needs a key, OSError if the address is
    taken, BaseError if the base cannot be read, FormatError if the folder of the adapters has none, and RuntimeError
    if the engines do not start.
    """
    keys = plan.keys()
    check_host(host, keys)
    app, settings = application(plan), plan.served
    count = 0 if settings.root is None else len(adapters_in(settings.root))
    load_tokenizer(plan.base)
    with bound(host, port) as listener:
        port = listener.getsockname()[1]
    address = os.environ.get("RAY_ADDRESS")
    stop: list[int] = []
    over = threading.Event()

    def end(number: int, _: object) -> None:
        stop.append(number)
        over.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _connect(address, plan)
        for number in before:  # Ray puts its own in their place
            signal.signal(number, end)
        serve.start(http_options={"host": host, "port": port})
        serve.run(app, name=NAME, route_prefix="/")
        say(
            console,
            f"serving {settings.name} with {counted(count, 'adapter')} and {counted(plan.replicas, 'engine')} on "
            f"{shown(host, port)}",
        )
        say(console, "the page is at /, Ctrl-C stops", style="dim")
        over.wait()
        serve.delete(NAME)  # waits for open requests
    finally:
        if address is None:
            serve.shutdown()
        ray.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 130 if stop and stop[0] == signal.SIGINT else 0


def _connect(address: str | None, plan: Plan) -> None:
    if address is not None:
        try:
            ray.init(address=address, log_to_driver=True)
        except ConnectionError as error:
            raise RuntimeError(f"RAY_ADDRESS={address}: no Ray cluster answers there: {error}") from None
        return
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # a busy machine takes longer than Ray's 5
    most = max(plan.replicas, plan.max_replicas or 0)
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, most + 1),
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        logging_level=logging.WARNING,
    )
