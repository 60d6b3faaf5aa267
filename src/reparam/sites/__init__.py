"""Sites: the modules that take the place of a model's own, which modules can be one, and how bases are told apart.

Every file in this folder is imported with it, so that each kind of site registers itself.
"""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
