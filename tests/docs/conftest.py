"""The script that writes the generated pages of the documentation."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def site() -> ModuleType:
    """The module `scripts/docs.py`, which is not in a package."""
    spec = importlib.util.spec_from_file_location("docs_script", Path(__file__).parents[2] / "scripts" / "docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
