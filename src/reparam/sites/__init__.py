"""Sites: the modules that replace a model's own modules, target resolution, and fingerprints of base models.

Importing this package imports every file in it, so that each kind of site registers itself.
"""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
