"""Adapters on a model: attach, select, save, load, merge, quantize."""
