"""Serving: many adapters over one base, in one batch. `Engine` is the entry point."""

from reparam.serve.counts import Metrics
from reparam.serve.engine import Engine
from reparam.serve.limits import Limits
from reparam.serve.request import Answer, Request, Token, Usage
from reparam.serve.stream import Stream

__all__ = ["Answer", "Engine", "Limits", "Metrics", "Request", "Stream", "Token", "Usage"]
