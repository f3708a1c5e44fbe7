"""What the tests of comparisons share: the tiny job, and a cache folder of their own."""

import pytest
from jobs.compare_job import make_compare_job


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder with the data and the LM of a tiny comparison."""
    return make_compare_job(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache folder of the module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QPEFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
