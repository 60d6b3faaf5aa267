"""Short garbage collections for the tests that train."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _short_collections():
    # transformers collects garbage at every start of training: most of the time here, over objects of the imports.
    gc.freeze()
    yield
    gc.unfreeze()
