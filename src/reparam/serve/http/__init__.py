"""HTTP for the engine, as OpenAI's clients speak it. `create_app` makes the application, `run` serves it."""

from reparam.serve.http.app import create_app
from reparam.serve.http.settings import Settings

__all__ = ["Settings", "create_app"]
