"""Held-out scores of a model and an adapter."""
