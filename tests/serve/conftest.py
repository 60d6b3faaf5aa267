"""What the tests of serving share."""

from pathlib import Path

import http_server
import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return http_server.make_base(tmp_path_factory.mktemp("served"))
