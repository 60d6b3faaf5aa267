"""The nouns that everything else is written in: weights, updates, methods, storages, and their registries."""
