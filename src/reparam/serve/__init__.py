"""Serving: many adapters over one base, in one batch. `Engine` is the entry point."""

from reparam.serve.engine import Answer, Engine, Request, Token
from reparam.serve.limits import Limits

__all__ = ["Answer", "Engine", "Limits", "Request", "Token"]
