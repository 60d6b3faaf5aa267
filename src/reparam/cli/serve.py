"""The verb serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reparam.cli.options import Dtype, console

NEEDED = {"fastapi", "prometheus_client", "sse_starlette", "starlette", "uvicorn"}
SIZES, BOUNDS, RAY = "Sizes of the engine", "Limits of requests", "Several engines"


def serve(
    base: Annotated[str, typer.Argument(help="Base model: a folder or a hub id.")],
    adapters: Annotated[
        Path | None,
        typer.Option(
            "--adapters",
            "-a",
            help="Folder with one folder for each adapter (or training run); requests name them. Nothing outside of it "
            "is read.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the base in requests. By default, that of its folder, or its hub id.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Any but this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            help="File with the keys of those who may use the server, one in each line. The environment variable "
            "REPARAM_API_KEY can hold one more.",
        ),
    ] = None,
    allow_loading: Annotated[
        bool,
        typer.Option("--allow-loading", help="Let clients load and unload adapters below the folder of the adapters."),
    ] = False,
    dtype: Dtype = "auto",
    storage: Annotated[
        str | None, typer.Option(help="Quantize the base while it is read: nf4 or int8. By default, it stays as it is.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests in one step.", rich_help_panel=SIZES)] = 64,
    step_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one step.", rich_help_panel=SIZES)] = 512,
    cache_tokens: Annotated[
        int, typer.Option(min=32, help="Tokens whose keys and values are kept.", rich_help_panel=SIZES)
    ] = 16_384,
    queue: Annotated[
        int, typer.Option(min=1, help="Answers that are computed or wait; further ones get 429.", rich_help_panel=SIZES)
    ] = 1024,
    adapter_bytes: Annotated[
        int, typer.Option(min=1, help="Bytes of the adapters that are ready at once.", rich_help_panel=SIZES)
    ] = 1 << 30,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer.", rich_help_panel=BOUNDS)] = 4096,
    body_bytes: Annotated[int, typer.Option(min=1, help="Bytes of one request.", rich_help_panel=BOUNDS)] = 1 << 20,
    seconds: Annotated[
        float, typer.Option(help="Seconds until a request must be answered.", rich_help_panel=BOUNDS)
    ] = 600,
    key_requests: Annotated[
        int, typer.Option(min=1, help="Answers at once for one key.", rich_help_panel=BOUNDS)
    ] = 256,
    drain_seconds: Annotated[
        float,
        typer.Option(help="Seconds that open requests have to end when the server stops.", rich_help_panel=BOUNDS),
    ] = 30,
    ray: Annotated[
        bool,
        typer.Option(
            "--ray", help="Serve with several engines on a Ray cluster: RAY_ADDRESS, or one here.", rich_help_panel=RAY
        ),
    ] = False,
    replicas: Annotated[
        int,
        typer.Option(
            min=1, help="Engines, each with a copy of the base; the fewest, if they vary.", rich_help_panel=RAY
        ),
    ] = 1,
    max_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="The most engines; their number follows the open requests.", rich_help_panel=RAY),
    ] = None,
    target_requests: Annotated[
        int | None,
        typer.Option(
            min=1, help="Open requests for each engine, which their number aims at; --requests.", rich_help_panel=RAY
        ),
    ] = None,
) -> int:
    """Serve a base and many adapters over HTTP, as OpenAI's clients speak it, in one batch. A page is at /.

    [bold]reparam serve ./model --adapters out[/bold]
    """
    if ray:
        _check_ray(allow_loading)
    elif replicas > 1 or max_replicas or target_requests:
        raise ValueError("--replicas, --max-replicas and --target-requests are for several engines; add --ray")
    try:
        from reparam.recipes.serve import name_of
        from reparam.recipes.serve import serve as run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in NEEDED:
            raise
        raise ValueError(
            f"reparam serve needs {package}, which is not installed: pip install 'reparam[serve]'"
        ) from None
    from reparam.serve.http.settings import Settings
    from reparam.serve.limits import Limits

    settings = Settings(
        name or name_of(base),
        root=adapters,
        loading=allow_loading,
        max_tokens=max_tokens,
        body_bytes=body_bytes,
        seconds=seconds,
        key_requests=key_requests,
        drain_seconds=drain_seconds,
    )
    limits = Limits(requests, step_tokens, cache_tokens, queue, adapter_bytes)
    if ray:
        from reparam.recipes.serve_ray import serve_on_ray
        from reparam.serve.ray import plan_of

        plan = plan_of(
            base,
            settings,
            limits,
            api_key_file=api_key_file,
            dtype=dtype,
            storage=storage,
            replicas=replicas,
            max_replicas=max_replicas,
            target_requests=target_requests,
        )
        return serve_on_ray(plan, host=host, port=port, console=console)
    return run(
        base,
        settings=settings,
        limits=limits,
        host=host,
        port=port,
        key_file=api_key_file,
        dtype=dtype,
        storage=storage,
        console=console,
    )


def _check_ray(loading: bool) -> None:
    """Raise ValueError if Ray Serve is not installed, and for what several engines cannot do."""
    try:
        import ray.serve  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"--ray needs {error.name}, which is not installed: pip install 'reparam[ray]'") from None
    if loading:
        raise ValueError(
            "--allow-loading: an adapter that is loaded over HTTP would be in one engine only; put its folder below "
            "--adapters and start the server again"
        )
