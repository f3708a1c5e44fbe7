"""Random lines and bytes give a result or a ValueError, and nothing else."""

import gzip

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qpeft_ext import formats
from qpeft_ext.formats import beir

# -- anything at all -----------------------------------------------------------------------------------------------

_VALID = [
    b'{"_id": "d1", "title": "t", "text": "x"}',
    b'{"_id": "q", "text": "x"}',
    b"query-id\tcorpus-id\tscore",
    b"q\td\t1",
    b"q Q0 d 1 0.5 t",
    b"q 0 d 1",
    b'{"query": "q", "positives": ["p"], "negatives": [{"text": "n"}]}',
]
_STRANGE = [
    b"\n",
    b"\r\n",
    b"\x00",
    b"{",
    b"[]",
    b'{"_id": ',
    b"\xff",
    b"nan",
    b"1e999",
    b"-",
    b"\t",
    b"9" * 5000,
    b"[" * 100_000,
    b'{"_id": 1, "text": 3}',
    b'{"_id": "\\ud800", "text": ""}',
    "q Q0 d \uff12 0.5 t".encode(),
]
_LINES = st.sampled_from(_VALID + _STRANGE) | st.binary(max_size=20)
_PLACES = st.none() | st.integers(0, 60)


def read_corpus(path):
    corpus = formats.Corpus(path)
    return {doc_id: corpus[doc_id] for doc_id in corpus}


@pytest.mark.slow
@pytest.mark.parametrize(
    "reader",
    [
        read_corpus,
        beir.read_queries,
        beir.read_qrels,
        formats.read_qrels,
        formats.read_run,
        formats.read_examples,
    ],
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(lines=st.lists(_LINES, max_size=8), compressed=st.booleans(), cut=_PLACES, flip=_PLACES)
def test_any_bytes_give_a_result_or_a_value_error(tmp_path, reader, lines, compressed, cut, flip):
    data = b"\n".join(lines)
    path = tmp_path / ("file.gz" if compressed else "file")
    content = gzip.compress(data, mtime=0) if compressed else data
    if flip is not None and flip < len(content):
        content = content[:flip] + bytes([content[flip] ^ 0x55]) + content[flip + 1 :]
    path.write_bytes(content[:cut])
    try:
        result = reader(path)
    except ValueError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error) and len(str(error)) < 400 + len(str(path))
    else:
        assert result, "an empty file must be an error"
    assert not list((tmp_path / "cache").glob("*.tmp"))
