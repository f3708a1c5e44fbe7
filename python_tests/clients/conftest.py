"""One server for all clients."""

import pytest
from served import serving


@pytest.fixture(scope="session")
def server():
    with serving() as server:
        yield server
