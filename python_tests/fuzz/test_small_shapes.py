"""Sizes of 1 everywhere, through the public API. More cases: python python_tests/fuzz/public_shapes.py --count 1000"""

import pytest
from fuzz.public_shapes import small_requests
from hypothesis import settings

pytestmark = pytest.mark.slow


test_small_requests = settings(max_examples=12, deadline=None)(small_requests)
