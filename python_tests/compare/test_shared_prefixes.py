"""`disk_bytes` and `kv_dtype` of a plan: prefixes that one method computes serve the next."""

import json

import pytest
from jobs.compare_job import assert_same_runs, compare, make_compare_job, results, runs, write_plan

from qpeft_ext.prefixes.cache import DocumentCache

pytestmark = pytest.mark.slow


METHODS = [
    "UPR: {method: upr}",
    "hard clues: {method: hard_clues, options: {k: 3}}",
    "ours: {method: q_peft_r, learning_rate: 1e-2}",
    "LoRA: {method: lora, learning_rate: 1e-2, peft: {r: 2}}",
]
CHANGES = {"cache_bytes: 1_000_000": "cache_bytes: 0\ndisk_bytes: 50_000_000", "seeds: [0, 1]": "seeds: [0]"}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder with data, a tiny LM, and the results of a plan without shared prefixes."""
    folder = make_compare_job(tmp_path_factory.mktemp("shared"))
    alone = {"seeds: [0, 1]": "seeds: [0]"}
    assert compare(write_plan(folder / "alone.yaml", folder, METHODS, **alone), folder, folder / "alone") == 0
    return folder


def from_files(output) -> dict[str, list[int]]:
    return {
        key[0]: [result.get(part, {}).get("prefixes_from_index", 0) for part in ("training", "ranking")]
        for key, result in results(output).items()
    }


def test_methods_share_prefixes_on_disk(job, tmp_path, capsys):
    """The first method fills the folder, later ones read it, in a later process too; a LoRA has prefixes of its own."""
    plan, out = write_plan(tmp_path / "plan.yaml", job, METHODS, **CHANGES), tmp_path / "out"
    assert compare(plan, job, out, "--method", "UPR") == 0
    assert from_files(out)["UPR"] == [0, 0]
    assert compare(plan, job, out) == 0
    assert "no times are given: hard clues (seed 0); ours (seed 0)" in (out / "comparison.md").read_text()
    read = from_files(out)
    assert read["UPR"] == read["LoRA"] == [0, 0]
    assert read["hard clues"][1] > 0 and all(read["ours"])
    ours, expected = runs(out), runs(job / "alone")
    trained = [name for name in expected if "/ours/" in name]
    assert trained and ours.keys() == expected.keys()
    for name in expected:  # Adam makes rounding larger
        assert_same_runs({name: ours[name]}, {name: expected[name]}, 2e-2 if name in trained else 1e-4)
    # another process that has the folder: this one does without
    with_other = tmp_path / "other"
    held = DocumentCache(0, disk=with_other / "prefixes", disk_bytes=1_000_000)
    capsys.readouterr()
    assert compare(plan, job, with_other, "--method", "UPR") == 0
    assert "prefixes are not shared with other methods: " in capsys.readouterr().out
    assert runs(with_other)["tiny/UPR/seed-0"] and held.tiers["disk"].nbytes == 0


def test_kv_dtype_is_a_setting(job, tmp_path, capsys):
    """Keys and values in 8 bits give other scores, so results are made again; a wrong name is one line."""
    out = tmp_path / "out"
    plan = write_plan(tmp_path / "plan.yaml", job, METHODS, **CHANGES)
    assert compare(plan, job, out, "--method", "UPR") == 0
    before = runs(out)["tiny/UPR/seed-0"]
    eight = {"dtype: float32": "dtype: float32\nkv_dtype: int8"}
    plan = write_plan(tmp_path / "plan.yaml", job, METHODS, **CHANGES, **eight)
    capsys.readouterr()
    assert compare(plan, job, out, "--method", "UPR") == 0
    assert "UPR, seed 0: made anew, since kv_dtype changed" in capsys.readouterr().out
    after = runs(out)["tiny/UPR/seed-0"]
    assert before.keys() == after.keys() and before != after
    assert_same_runs({"UPR": after}, {"UPR": before}, 0.5)
    assert json.loads((out / "tiny" / "UPR" / "seed-0" / "settings.json").read_text())["kv_dtype"] == "int8"
    plan = write_plan(tmp_path / "plan.yaml", job, METHODS, **CHANGES, **{"dtype: float32": "kv_dtype: int3"})
    assert compare(plan, job, out) == 2
    assert "kv_dtype: it must be one of float32, bfloat16, float16, int8, got 'int3'" in capsys.readouterr().err
