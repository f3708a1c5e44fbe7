"""For all tests that train."""

import pytest
import transformers


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
