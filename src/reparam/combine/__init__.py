"""Combine saved adapters: weighted sums, compression, search for weights, and splitting of mixtures."""
