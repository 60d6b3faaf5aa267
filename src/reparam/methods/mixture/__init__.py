"""Mixtures of experts, from four pieces: experts, a router, what is selected, and how outputs are combined."""
