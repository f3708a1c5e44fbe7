"""Fusion against hand-computed sums, and weights that are chosen on dev."""

import math

import pytest

from qpeft_ext import formats
from qpeft_ext.cli import main
from qpeft_ext.evaluation.fusion import choose_weights, fuse, reciprocal_rank_fusion

ONE = {"q": [("a", 10.0), ("b", 6.0), ("c", 2.0)], "single": [("a", 1.0)]}
TWO = {"q": [("c", 1.0), ("d", 0.0)]}


def test_fuse_min_max():
    fused = fuse([ONE, TWO], [1.0, 0.5])
    assert fused["q"] == [("a", 1.0), ("b", 0.5), ("c", 0.5), ("d", 0.0)]  # equal ones in the order of the first run
    assert fused["single"] == [("a", 0.0)]
    assert [d for d, _ in fuse([ONE], [-1.0])["q"]] == ["c", "b", "a"]


def test_fuse_z_score():
    fused = dict(fuse([ONE, TWO], normalization="z_score")["q"])
    z = math.sqrt(1.5)  # of 10, 6, 2: mean 6, deviation sqrt(32 / 3)
    assert fused == pytest.approx({"a": z - 1, "b": 0 - 1, "c": -z + 1, "d": -z - 1})


def test_reciprocal_rank_fusion():
    fused = dict(reciprocal_rank_fusion([ONE, TWO])["q"])
    assert fused == pytest.approx({"a": 1 / 61, "b": 1 / 62, "c": 1 / 63 + 1 / 61, "d": 1 / 62})
    assert [d for d, _ in reciprocal_rank_fusion([ONE, TWO])["q"]] == ["c", "a", "b", "d"]


def test_fused_runs_can_be_written(tmp_path):
    formats.write_run(tmp_path / "run", fuse([ONE, TWO]))
    assert formats.read_run(tmp_path / "run").keys() == {"q", "single"}


def test_what_cannot_be_fused():
    for runs, weights in (([], None), ([ONE], [1.0, 2.0]), ([ONE], [math.nan]), ([ONE, TWO], [0.0, 0.0])):
        with pytest.raises(ValueError, match="expected one finite weight per run"):
            fuse(runs, weights)
    with pytest.raises(ValueError, match="normalization must be min_max or z_score, got 'rank'"):
        fuse([ONE], normalization="rank")
    with pytest.raises(ValueError, match="scores must be finite"):
        fuse([{"q": [("a", math.inf)]}])
    for k, got in ((-1, "-1"), (math.nan, "nan"), (math.inf, "inf"), (2**31, "2147483648"), (10**400, "1000")):
        with pytest.raises(ValueError, match=f"k must be from 0 to 2147483647, got {got}"):
            reciprocal_rank_fusion([ONE], k=k)


def test_the_largest_k_still_tells_ranks_apart():
    ranking = [(f"d{i}", -float(i)) for i in range(50)]
    fused = reciprocal_rank_fusion([{"q": ranking[::-1]}, {"q": ranking}, {"q": ranking}], k=2**31 - 1)["q"]
    assert [doc_id for doc_id, _ in fused] == [doc_id for doc_id, _ in ranking]


# -- weights -------------------------------------------------------------------------------------------------------

GOOD = {f"q{i}": [("x", 2.0), ("n", 1.0)] for i in range(4)}
BAD = {q: [("n", 9.0), ("x", 8.0)] for q in GOOD}
TRUTH = {q: {"x": 1} for q in GOOD}


def test_choose_weights():
    assert choose_weights([GOOD, BAD], TRUTH) == ([1.0, 0.0], 1.0)
    weights, value = choose_weights([BAD, GOOD], TRUTH)
    assert weights == [0.45, 0.55] and value == 1.0  # the least that puts x first
    assert choose_weights([GOOD, GOOD, BAD], TRUTH, "RR@10", "z_score") == ([1.0, 0.0, 0.0], 1.0)
    for runs in ([GOOD], [GOOD] * 5):
        with pytest.raises(ValueError, match="expected 2 to 4 runs"):
            choose_weights(runs, TRUTH)


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """Runs for the test queries and, with other queries, for dev."""
    for name, run in (("good", GOOD), ("bad", BAD)):
        formats.write_run(tmp_path / f"{name}.trec", run)
        formats.write_run(tmp_path / f"{name}-dev.trec", {f"dev-{q}": ranking for q, ranking in run.items()})
    (tmp_path / "dev.qrels").write_text("".join(f"dev-{q} 0 x 1\n" for q in TRUTH))
    return tmp_path


def fuse_command(files, *options):
    return main(["fuse", f"{files}/bad.trec", f"{files}/good.trec", "--output", f"{files}/out.trec", *options])


def test_fuse_command(files, capsys):
    assert fuse_command(files) == 0 and "reciprocal ranks, k 60" in capsys.readouterr().out
    assert fuse_command(files, "--method", "scores", "--weights", "1,2") == 0
    assert [d for d, _ in formats.read_run(files / "out.trec")["q0"]] == ["x", "n"]
    dev = [
        "--method",
        "scores",
        "--dev-run",
        f"{files}/bad-dev.trec",
        "--dev-run",
        f"{files}/good-dev.trec",
        "--dev-qrels",
        f"{files}/dev.qrels",
    ]
    assert fuse_command(files, *dev) == 0
    assert "weights 0.45, 0.55 chosen on 4 dev queries (nDCG@10 1.0000" in capsys.readouterr().out
    assert [d for d, _ in formats.read_run(files / "out.trec")["q0"]] == ["x", "n"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--method", "sum"], "--method must be rrf or scores, got 'sum'"),
        (["--method", "scores"], "--method scores needs --weights, or --dev-run for each run and --dev-qrels"),
        (["--method", "scores", "--weights", "1"], "--weights: expected 2 numbers with commas between them"),
        (["--method", "scores", "--weights", "1,x"], "--weights: expected numbers with commas between them, got '1,x'"),
        (
            ["--method", "scores", "--dev-run", "a", "--dev-qrels", "b"],
            "expected 2 --dev-run, in the order of the runs",
        ),
        (["--weights", "1,2"], "--weights belongs to --method scores"),
        (
            [
                "--method",
                "scores",
                "--dev-run",
                "{files}/bad.trec",
                "--dev-run",
                "{files}/good.trec",
                "--dev-qrels",
                "{files}/test.qrels",
            ],
            "query 'q0' is among the dev queries and among those to fuse",
        ),
    ],
)
def test_bad_fusions(files, capsys, options, message):
    (files / "test.qrels").write_text("q0 0 x 1\n")
    assert fuse_command(files, *(option.format(files=files) for option in options)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (files / "out.trec").exists()


@pytest.mark.parametrize("score", [0.1, 0.3, 1 / 3, 7.7])
@pytest.mark.parametrize("normalization", ["min_max", "z_score"])
def test_equal_scores_are_0(score, normalization):
    """The mean of equal scores may miss them by rounding, and so may their deviation miss 0."""
    fused = fuse([{"q": [(doc_id, score) for doc_id in "abc"]}], normalization=normalization)
    assert fused == {"q": [("a", 0.0), ("b", 0.0), ("c", 0.0)]}


@pytest.mark.parametrize("weights", [[0.0, 0.0], [math.nan, 1.0], [1.0, math.inf], [1.0]])
def test_weights_that_rank_nothing_are_refused(weights):
    run = {"q": [("a", 2.0), ("b", 1.0)]}
    for combine in (fuse, reciprocal_rank_fusion):
        with pytest.raises(ValueError, match="expected one finite weight per run, not all 0"):
            combine([run, run], weights=weights)


def test_a_document_that_a_run_has_twice_is_refused():
    once, twice = {"q": [("a", 2.0), ("b", 1.0)]}, {"q": [("a", 3.0), ("b", 2.0), ("a", 1.0)]}
    for combine in (fuse, reciprocal_rank_fusion):
        with pytest.raises(ValueError, match="document 'a' occurs twice for query 'q'"):
            combine([once, twice])


def test_equal_sums_are_in_the_order_of_the_first_run():
    first = {"q": [("c", 2.0), ("a", 1.0), ("b", 1.0)]}
    second = {"q": [("b", 2.0), ("a", 2.0), ("c", 1.0)]}  # all sums are 1, and those of d and e are 0
    second["q"] += [("e", 1.0), ("d", 1.0)]
    assert [doc_id for doc_id, _ in fuse([first, second])["q"]] == ["c", "a", "b", "e", "d"]
