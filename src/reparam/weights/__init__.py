"""Storages: one file for each format of a frozen matrix. Importing this package imports all of them."""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
