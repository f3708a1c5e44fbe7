"""The examples in the docstrings of the public operators print what they show."""

import doctest
import sys

import pytest

from qpeft_ext import ops


@pytest.mark.parametrize(
    "function", [ops.ProjectedTable, ops.clue_attention, ops.similarity_topk, ops.token_log_likelihood]
)
def test_examples_print_what_they_show(function):
    tests = doctest.DocTestFinder(recurse=False).find(
        function, function.__name__, module=sys.modules[function.__module__], globs={}
    )
    assert sum(len(test.examples) for test in tests) > 0
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0
