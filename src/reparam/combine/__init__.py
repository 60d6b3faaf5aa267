"""Finished adapters combined: sums, compression, searches for weights, splits."""
