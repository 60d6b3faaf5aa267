"""The application: its addresses, and what they answer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from reparam.serve.engine import Engine
from reparam.serve.http import errors, page
from reparam.serve.http.answers import Answers
from reparam.serve.http.catalog import Catalog, Model
from reparam.serve.http.errors import Problem
from reparam.serve.http.guard import Gone, Guard, caller_of
from reparam.serve.http.metrics import OfEngine, Traffic
from reparam.serve.http.prompts import Prompts
from reparam.serve.http.schema import (
    MOST_SEED,
    Asked,
    ChatRequest,
    CompletionRequest,
    LoadRequest,
    UnloadRequest,
)
from reparam.serve.http.settings import Settings
from reparam.serve.http.shapes import ChatShape, TextShape
from reparam.serve.request import Request


def create_app(engine: Engine, settings: Settings) -> Guard:
    """The ASGI application that serves an engine, which must have a tokenizer.

    The engine stays open when the application ends. Raises ValueError if an adapter has the name of the base.
    """
    return _Application(engine, settings).guard


class _Application:
    """The addresses, over one engine."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.catalog = Catalog(engine, settings)
        self.prompts = Prompts(engine)
        self.traffic = Traffic()
        self.traffic.registry.register(OfEngine(engine))
        self.app = FastAPI(
            title="reparam",
            docs_url=None,
            redoc_url=None,
            lifespan=self._life,
            responses={"4XX": {"model": errors.Body}, "5XX": {"model": errors.Body}},
        )
        errors.install(self.app)
        self.app.exception_handler(Gone)(_gone)
        self._routes()
        self.guard = Guard(self.app, settings, self.traffic, engine.limits.open_requests)

    @contextlib.asynccontextmanager
    async def _life(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        self.prompts.close()
        self.catalog.close()

    def _routes(self) -> None:
        post, get = self.app.post, self.app.get
        post("/v1/chat/completions", response_model=None)(self.chat)
        post("/v1/completions", response_model=None)(self.completions)
        post("/v1/load_lora_adapter", response_class=PlainTextResponse, response_model=None)(self.load)
        post("/v1/unload_lora_adapter", response_class=PlainTextResponse, response_model=None)(self.unload)
        get("/v1/models")(self.models)
        get("/v1/models/{name:path}")(self.model)
        get("/health", response_model=None)(self.health)
        get("/ready", response_model=None)(self.ready)
        get("/metrics", response_class=PlainTextResponse, response_model=None)(self.metrics)
        get("/", include_in_schema=False, response_model=None)(self.page)

    async def chat(self, request: ChatRequest, http: HttpRequest) -> Response:
        """Answer a chat."""
        model = await self._model(request, http)
        ids, stops = await self.prompts.chat(request, model.prompt_format)
        most = self._most(*request.most, ids)
        wanted = (request.top_logprobs or 0) if request.logprobs else None
        made = self._requests(request, http, model, ids, most, stops, wanted)
        return await self._answer(request, http, made, ChatShape)

    async def completions(self, request: CompletionRequest, http: HttpRequest) -> Response:
        """Continue texts."""
        model = await self._model(request, http)
        made: list[Request] = []
        for prompt in request.prompts:
            ids = await self.prompts.text(prompt) if isinstance(prompt, str) else prompt
            most = self._most("max_tokens", request.max_tokens, ids)
            made += self._requests(request, http, model, ids, most, None, request.logprobs)
        return await self._answer(request, http, made, TextShape)

    async def models(self) -> JSONResponse:
        """List the models."""
        return JSONResponse({"object": "list", "data": self.catalog.listed()})

    async def model(self, name: str) -> JSONResponse:
        """Show a model."""
        found = [entry for entry in self.catalog.listed() if entry["id"] == name]
        if not found:
            raise Problem(404, f"no model is named {name[:128]!r}", code="model_not_found", param="model")
        return JSONResponse(found[0])

    async def load(self, request: LoadRequest) -> Response:
        """Read an adapter below the folder of the adapters."""
        self._check_loading()
        digest = await self.catalog.load(request.lora_name, request.lora_path, replace=request.load_inplace)
        return PlainTextResponse(
            f"Success: LoRA adapter '{request.lora_name}' added successfully.", headers={"x-reparam-digest": digest}
        )

    async def unload(self, request: UnloadRequest) -> Response:
        """Forget an adapter."""
        self._check_loading()
        await self.catalog.unload(request.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' removed successfully.")

    async def health(self) -> Response:
        """Whether the server lives; it can be between two engines."""
        alive = self.engine.state != "closed"
        return JSONResponse({"status": self.engine.state}, 200 if alive else 503)

    async def ready(self) -> Response:
        """Whether the server takes requests."""
        ready = self.engine.ready and not self.guard.stopping
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def metrics(self) -> Response:
        """Numbers for Prometheus."""
        return Response(generate_latest(self.traffic.registry), media_type=CONTENT_TYPE_LATEST)

    async def page(self) -> Response:
        """The page that asks several models the same."""
        return HTMLResponse(page.HTML, headers={"content-security-policy": page.POLICY})

    async def _model(self, request: Asked, http: HttpRequest) -> Model:
        found = await self.catalog.find(request.model)
        caller_of(http.scope).told = f"model={found.label[:128]}"
        return found

    def _most(self, field: str, wanted: int | None, ids: Sequence[int]) -> int:
        """The most tokens of an answer to this prompt. Raises Problem 400 if more are asked for than allowed."""
        most = self.settings.max_tokens
        if wanted is not None and wanted > most:
            raise Problem(400, f"{field}={wanted:,}: this server takes at most {most:,}", param=field)
        return wanted or max(1, min(most, self.engine.longest - len(ids)))

    def _requests(
        self,
        request: Asked,
        http: HttpRequest,
        model: Model,
        ids: Sequence[int],
        most: int,
        stops: Sequence[int] | None,
        logprobs: int | None,
    ) -> list[Request]:
        """The requests of all choices; with a seed, each choice has the next one."""
        seeds = [None if request.seed is None else (request.seed + i) % (MOST_SEED + 1) for i in range(request.n)]
        one = Request(
            ids,
            model.adapter,
            most,
            temperature=request.temperature,
            top_k=request.top_k if request.top_k > 0 else None,
            top_p=request.top_p,
            stop_tokens=stops,
            stop=request.stops,
            logprobs=logprobs,
            salt=caller_of(http.scope).owner,
        )
        return [dataclasses.replace(one, seed=seed) for seed in seeds]

    async def _answer(
        self, request: Asked, http: HttpRequest, made: Sequence[Request], shape: type[ChatShape | TextShape]
    ) -> Response:
        caller = caller_of(http.scope)
        wanted = made[0].logprobs is not None
        shaped = shape(caller.id, request.model, self._text_of if wanted else None)
        answers = Answers(self.engine, self.settings, self.guard.gate, self.traffic, caller)
        await answers.begin(made, copies=request.n)
        usage = request.stream_options is not None and request.stream_options.include_usage
        return await answers.respond(http, shaped, stream=request.stream, usage=usage)

    def _text_of(self, token: int) -> str:
        text: str = self.engine.tokenizer.decode([token])  # type: ignore[union-attr,assignment]
        return text

    def _check_loading(self) -> None:
        if not self.settings.loading:
            raise Problem(
                403, "loading over HTTP is off; start the server with --allow-loading to turn it on", code="loading_off"
            )


async def _gone(request: HttpRequest, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; it is for the log
