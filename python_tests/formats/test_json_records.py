"""Records of large JSON files are read one by one."""

import gzip
import json
from types import SimpleNamespace

import pytest
from small_data import write_lines

from qpeft_ext.formats import json_records
from qpeft_ext.formats.json_records import read_records


def write_json(path, value, indent=None):
    return write_lines(path, [json.dumps(value, ensure_ascii=False, indent=indent)])


# -- streaming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 64])
def test_records_across_the_borders_of_what_is_read(tmp_path, size, monkeypatch):
    """The same records however few bytes come at once."""
    whole = json_records._Text.more

    def little(text):
        read = text.file.read
        text.file = SimpleNamespace(read=lambda _: read(size))
        try:
            whole(text)
        finally:
            text.file = SimpleNamespace(read=read)

    records = [{"question": f'é\u2028 月 {i} \\" ]}}', "n": [1e-3, -0.5, None, True, {"a": [[]]}]} for i in range(5)]
    monkeypatch.setattr(json_records._Text, "more", little)
    for name, value in [("list", records), ("object", {str(i): r for i, r in enumerate(records)})]:
        for indent in (None, 3):
            path = write_json(tmp_path / f"{name}.json", value, indent)
            assert [record for _, _, record in read_records(path, "question")] == records
    path = write_lines(tmp_path / "a.jsonl", map(json.dumps, records))
    places, _, _ = zip(*read_records(path, "question"), strict=True)
    assert [str(place) for place in places] == [f"{i}, record {i}" for i in range(1, 6)]
    path = write_json(tmp_path / "b.json", records)
    assert str(list(read_records(path, "question"))[-1][0]) == "1, record 5"


@pytest.mark.slow
def test_a_long_list_is_not_held(tmp_path):
    """Ten thousand records of 10 kB, of which a traced reader holds a few at a time."""
    import tracemalloc

    path = tmp_path / "long.json.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.write("[" + ",".join(json.dumps({"question": str(i), "text": "x" * 10_000}) for i in range(3000)) + "]")
    tracemalloc.start()
    count = sum(1 for _ in read_records(path, "question"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000 and peak < 12e6, peak
