"""The toys are registered while the conformance suite runs, and at no other time."""

from collections.abc import Iterator

import pytest
from toys import Fixed16, Nudge, ProductSite, registered


@pytest.fixture(autouse=True)
def _toys() -> Iterator[None]:
    with registered(fixed16=Fixed16, nudge=Nudge, product=ProductSite):
        yield
