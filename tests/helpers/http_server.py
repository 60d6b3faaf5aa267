"""A server on loopback in a thread of this process, over a tiny base with two adapters."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import torch
from openai import OpenAI
from serving import save
from transformers import AutoModelForCausalLM, AutoTokenizer

import reparam
from reparam.serve import Engine, Limits
from reparam.serve.http.run import Server, bound
from reparam.serve.http.settings import Settings

SIZES = Limits(requests=8, step_tokens=64, cache_tokens=2048)
KEY = "a-key-of-this-test"


@dataclass
class Served:
    """A running server."""

    url: str
    port: int
    engine: Engine
    server: Server

    def client(self, key: str = "none", **settings: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **settings)


def make_base(folder: Path) -> Path:
    """A tiny Llama with the embedded model's tokenizer, and adapters `a`, `b` and `dora` of it below `adapters`."""
    models.save_base(folder / "tiny", tie_word_embeddings=False, initializer_range=0.2, max_position_embeddings=256)
    model = load(folder)
    for seed, name in enumerate(("a", "b")):
        save(model, folder / "adapters" / name, seed=seed, method=reparam.LoRA(r=2 + seed, alpha=8))
    save(model, folder / "adapters" / "dora", seed=5, method=reparam.DoRA(r=2))
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype=torch.float32).eval()


def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "tiny")


@contextmanager
def serving(folder: Path, *, limits: Limits = SIZES, **settings: Any) -> Iterator[Served]:
    root = settings.pop("root", folder / "adapters")
    with Engine(load(folder), tokenizer(folder), adapters=root, limits=limits) as engine:
        listener = bound("127.0.0.1", 0)
        server = Server(engine, Settings("tiny", root=root, **settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            port = listener.getsockname()[1]
            yield Served(f"http://127.0.0.1:{port}", port, engine, server)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def until(true: Any, seconds: float = 30) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not come true"
        time.sleep(0.01)
