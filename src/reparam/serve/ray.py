"""Engines on a Ray cluster: a front that checks requests, and replicas of an engine that answer them.

The front has the key, the limits of a request and the log. It sends each request to a replica that has the adapter, by
the digest of the adapter, and asks another replica if one dies before anything of the answer was sent. Each replica has
an engine and the application of `reparam serve`. `application` is what Ray's serve.yaml imports. Ray reads the type of
its argument, so annotations are no strings in this file.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pydantic
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import LoggingConfig
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reparam.core.registry import find_storage
from reparam.errors import ReparamError
from reparam.hf.models import load_base, load_tokenizer
from reparam.serve.engine import Engine
from reparam.serve.http.app import create_app
from reparam.serve.http.auth import VARIABLE, read_keys
from reparam.serve.http.errors import Problem
from reparam.serve.http.guard import Caller, Guard
from reparam.serve.http.log import log_to_errors
from reparam.serve.http.metrics import Traffic
from reparam.serve.http.relay import Relay
from reparam.serve.http.settings import LOCAL, Settings
from reparam.serve.limits import Limits

KEPT = 256
"""Adapters that Ray remembers of a replica, to send requests for them there."""
FRONT = 2048
"""Requests at once in one front."""
FIXED = {"name", "root", "keys", "hosts", "loading"}
"""Settings of the server that follow from others, or cannot be had."""
TOLD = "reparam.told"
"""The type of the message that ends an answer: what the front's log says of it."""


class Plan(pydantic.BaseModel):
    """The arguments of `application`, in serve.yaml under `args`. They mean what the command line's do.

    Raises ValidationError for unknown names and wrong types.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    base: str
    """A folder or a hub id."""
    adapters: str | None = None
    """The folder of the adapters, on all nodes."""
    name: str | None = None
    """The name of the base in requests; that of its folder, or its hub id, without one."""
    api_key_file: str | None = None
    """A file with a key in each line, on the node of the front."""
    local: bool = False
    """Whether the server works without keys. Only for an address that no other machine reaches."""
    dtype: str = "auto"
    storage: str | None = None
    replicas: int = pydantic.Field(1, ge=1)
    max_replicas: int | None = pydantic.Field(None, ge=1)
    """With more than `replicas`, replicas come and go with the number of open requests."""
    target_requests: int | None = pydantic.Field(None, ge=1)
    """Open requests for each replica, computed or waiting, that more and fewer replicas aim at; `requests` without."""
    settings: dict[str, Any] = {}
    """Further fields of `reparam.serve.http.settings.Settings`, such as max_tokens."""
    limits: dict[str, Any] = {}
    """Fields of `reparam.serve.Limits`."""

    def keys(self) -> tuple[str, ...]:
        """The keys in the file and the environment. Raises ValueError for those that cannot be used."""
        return read_keys(None if self.api_key_file is None else Path(self.api_key_file))

    @property
    def served(self) -> Settings:
        """The settings of the server, without keys. Raises ValueError for those that cannot be."""
        unknown = self.settings.keys() & FIXED
        if unknown:
            raise ValueError(f"settings: {min(unknown)} cannot be set here")
        root = None if self.adapters is None else Path(self.adapters).absolute()
        name = self.name or (Path(self.base).absolute().name if Path(self.base).is_dir() else self.base)
        return Settings(name, root=root, **self.settings)

    @property
    def sizes(self) -> Limits:
        """The sizes of each engine. Raises ValueError for those with which nothing could run."""
        return Limits(**self.limits)


class Replica:
    """An engine, which answers what the front sends."""

    def __init__(self, plan: Plan) -> None:
        made = find_storage(plan.storage)() if plan.storage not in (None, "dense") else None
        model = load_base(plan.base, dtype=plan.dtype, storage=made)
        settings = plan.served
        self.engine = Engine(model, load_tokenizer(plan.base), adapters=settings.root, limits=plan.sizes)
        self.app: Any = create_app(self.engine, settings).app
        log_to_errors()

    @serve.multiplexed(max_num_models_per_replica=KEPT)
    async def hold(self, digest: str) -> str:
        """Tell Ray that this replica has an adapter. The engine reads it, and keeps it as long as there is room."""
        return digest

    async def call(
        self, scope: dict[str, Any], body: bytes, caller: Caller, wanted: Mapping[str, str]
    ) -> AsyncIterator[Message]:
        """The messages of the application's answer to a request, and last what the log says of it.

        `wanted` are the digests of the adapters by name. If this replica has read other bytes, the answer is a 409.
        """
        if held := serve.get_multiplexed_model_id():
            await self.hold(held)
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        given = False

        async def receive() -> Message:
            nonlocal given
            if given:
                await asyncio.Event().wait()  # a client that leaves cancels the task
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            messages.put_nowait(message)

        async def run() -> None:
            try:
                if (problem := await self._problem(wanted)) is not None:
                    await problem.response()(full, receive, send)
                else:
                    await self.app(full, receive, send)
            finally:
                messages.put_nowait(None)

        full = {**scope, "reparam": caller}
        task = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task
            yield {"type": TOLD, "told": caller.told}
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def check_health(self) -> None:
        """Raise RuntimeError if the engine has ended, so that Ray begins another replica."""
        if self.engine.state == "closed":
            raise RuntimeError("the engine has ended")

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close()

    async def _problem(self, wanted: Mapping[str, str]) -> Problem | None:
        for name, digest in wanted.items():
            try:
                own = (await self.engine.look(name)).digest
            except ReparamError:
                continue  # the application tells why
            if own != digest:
                return Problem(
                    409, f"the files of {name} have changed since the server read them; start it again", param="model"
                )
        return None


class Front:
    """What is reached from outside: the checks of each request, and the way to a replica."""

    def __init__(self, engines: Any, plan: Plan) -> None:
        log_to_errors()
        keys = plan.keys()
        _check_keys(keys, plan)
        settings = dataclasses.replace(plan.served, keys=keys, hosts=None if keys else LOCAL)
        traffic = Traffic()
        self._engines = engines
        self.guard = Guard(Relay(self._call, settings, traffic), settings, traffic, plan.sizes.open_requests)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The ASGI application."""
        return _without_id(self.guard)

    async def _call(
        self, scope: dict[str, Any], body: bytes, caller: Caller, wanted: Mapping[str, str]
    ) -> AsyncIterator[Message]:
        """The messages of a replica. Raises Ray's errors if it dies."""
        way = self._engines.options(stream=True, multiplexed_model_id="+".join(wanted.values()))
        answer = way.call.remote(scope, body, caller, dict(wanted))
        try:
            async for message in answer:
                if message["type"] == TOLD:
                    caller.told = message["told"]
                else:
                    yield message
        finally:
            with contextlib.suppress(Exception):
                answer.cancel()


def _without_id(app: ASGIApp) -> ASGIApp:
    """The application, whose answers have no request id: Ray's proxy adds the same one."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await app(scope, receive, answer)

    return call


def application(args: Plan) -> Any:
    """The application for `serve run`, `serve deploy` and KubeRay (see docs/deploy).

    Raises ValueError for settings that cannot be, and if there are no keys and `local` is not set.
    """
    sizes, settings = args.sizes, args.served
    most = args.max_replicas or args.replicas
    if most < args.replicas:
        raise ValueError(f"max_replicas={most} is below replicas={args.replicas}; raise it")
    _check_keys(args.keys(), args)
    scaling: dict[str, Any] = {"num_replicas": args.replicas}
    if most > args.replicas:
        target = args.target_requests or sizes.requests
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=args.replicas, max_replicas=most, target_ongoing_requests=target
            )
        }
    common: dict[str, Any] = {
        "logging_config": LoggingConfig(log_level="WARNING", enable_access_log=False),
        "graceful_shutdown_timeout_s": settings.drain_seconds,
        "graceful_shutdown_wait_loop_s": 0.2,
    }
    engines: Any = serve.deployment(
        Replica,
        name="engines",
        max_ongoing_requests=sizes.open_requests,
        ray_actor_options={"num_cpus": 1},
        health_check_period_s=5,
        **scaling,
        **common,
    )
    front: Any = serve.deployment(
        serve.ingress()(Front),
        name="front",
        max_ongoing_requests=FRONT,
        ray_actor_options={"num_cpus": 0.1},
        **common,
    )
    return front.bind(engines.bind(args), args)


def plan_of(base: str, settings: Settings, limits: Limits, **more: Any) -> Plan:
    """The plan of a server that other machines cannot reach, or that has keys. `more` are further fields of it."""
    own = dataclasses.asdict(settings)
    fields = {name: own[name] for name in own.keys() - FIXED}
    folders: dict[str, Any] = {"adapters": None if settings.root is None else str(settings.root)}
    if (file := more.pop("api_key_file", None)) is not None:
        folders["api_key_file"] = str(Path(file).absolute())
    return Plan(
        base=str(Path(base).absolute()) if Path(base).is_dir() else base,
        name=settings.name,
        local=True,
        settings=fields,
        limits=dataclasses.asdict(limits),
        **folders,
        **more,
    )


def _check_keys(keys: tuple[str, ...], plan: Plan) -> None:
    if not keys and not plan.local:
        raise ValueError(
            f"other machines could use the server, so it needs a key; write one into the file of api_key_file, or into "
            f"the environment variable {VARIABLE}"
        )
