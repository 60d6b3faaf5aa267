"""Score a model, with and without an adapter, on held-out rows."""
