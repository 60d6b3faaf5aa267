"""Methods: one file for each parameterization of a change. Every file in this folder is imported with it."""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
