"""Inspect adapters: their content, and how they change the weights of the base."""
