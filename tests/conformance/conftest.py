"""The toy storage is registered while the conformance suite runs, so that every check also meets a packed storage."""

from collections.abc import Iterator

import pytest
from toys import Fixed16, registered


@pytest.fixture(autouse=True)
def _toy_storage() -> Iterator[None]:
    with registered(fixed16=Fixed16):
        yield
