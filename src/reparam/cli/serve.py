"""The verb serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reparam.cli.options import Dtype, console

NEEDED = {"fastapi", "prometheus_client", "sse_starlette", "starlette", "uvicorn"}
SIZES, BOUNDS = "Sizes of the engine", "Limits of requests"


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
) -> int:
    """Serve a base and many adapters over HTTP, as OpenAI's clients speak it, in one batch. A page is at /.

    [bold]reparam serve ./model --adapters out[/bold]
    """
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
