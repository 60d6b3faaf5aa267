"""Methods: one file or folder for each parameterization. Importing this package imports and registers all of them."""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
