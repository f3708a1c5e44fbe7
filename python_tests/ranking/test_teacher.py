"""`PartialExamples`: teacher scores that are resumed."""

import contextlib

import pytest

from qpeft_ext.formats import read_examples
from qpeft_ext.ranking.teacher import PartialExamples

LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # of Python; only the first one ends a line of JSON lines
EXAMPLES = [
    {"query": f"which {end} one", "positives": [f"a{end}b"], "negatives": [end], "positive_scores": [-1.5]}
    for end in LINE_ENDS
]


@pytest.mark.parametrize("size", [1, 3, len(EXAMPLES)])
def test_texts_with_any_line_end_are_resumed(size, tmp_path, caplog):
    path, settings = tmp_path / "scores.jsonl", {"of": "this job"}
    blocks = [EXAMPLES[start : start + size] for start in range(0, len(EXAMPLES), size)]
    for number, block in enumerate(blocks):
        with contextlib.closing(PartialExamples(path, settings, len(EXAMPLES))) as partial:
            assert partial.examples == EXAMPLES[: number * size]
            partial.add(block)
    partial = PartialExamples(path, settings, len(EXAMPLES))
    assert partial.examples == EXAMPLES and not caplog.records
    partial.finish()
    assert read_examples(path) == EXAMPLES
