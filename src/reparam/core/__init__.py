"""The base classes of the library (weights, sites, updates, methods, storages) and the registries."""
