"""Tables of `qpeft compare` by hand: tests of significance, deviations, candidate recall, labels of plots."""

import json
from dataclasses import replace

import numpy as np
import pytest
from evaluation.test_report import Tags
from jobs.compare_job import write_plan

from qpeft_ext.compare.cells import cells
from qpeft_ext.compare.label_places import _POINT, _around, _shared, label_places
from qpeft_ext.compare.notes import quality_notes
from qpeft_ext.compare.page import html
from qpeft_ext.compare.plan_file import read_plan
from qpeft_ext.compare.tables import build_tables
from qpeft_ext.compare.texts import csv_text, json_text, markdown
from qpeft_ext.evaluation.measures import per_query

pytest.importorskip("ir_measures")


def test_holm_and_deviations_by_hand(job, tmp_path):
    """Three methods against UPR on four queries; p-values from scipy's ttest_rel, corrected by hand."""
    from scipy.stats import ttest_rel

    methods = [
        "UPR: {method: upr}",
        "A: {method: q_peft_a, learning_rate: 1}",
        "R: {method: q_peft_r, learning_rate: 1}",
    ]
    plan = read_plan(
        write_plan(
            tmp_path / "plan.yaml",
            job,
            methods,
            **{"measures: [nDCG@10, RR@10, CandidateRecall@2]": "measures: [RR@10]"},
        )
    )
    values = {
        ("first stage", 0): [0.1, 0.2, 0.3, 0.4], ("UPR", 0): [0.2, 0.5, 0.4, 0.5],
        ("A", 0): [0.5, 0.6, 0.8, 0.9], ("A", 1): [0.7, 0.8, 0.8, 0.7],
        ("R", 0): [0.2, 0.4, 0.5, 0.5], ("R", 1): [0.2, 0.4, 0.5, 0.7],
    }  # fmt: skip
    for (name, seed), row in values.items():
        folder = tmp_path / "out" / "tiny" / name.replace(" ", "-") / f"seed-{seed}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(
            json.dumps({"method": name, "seed": seed, "per_query": {"RR@10": dict(zip("abcd", row, strict=True))}})
        )
    (table,) = build_tables(plan, tmp_path / "out")
    rows = {row.name: row for row in table.rows}
    assert list(rows) == ["first stage", "UPR", "A", "R"]
    a, r = [0.6, 0.7, 0.8, 0.8], [0.2, 0.4, 0.5, 0.6]
    assert rows["A"].means["RR@10"] == pytest.approx(0.725)
    assert rows["A"].deviations["RR@10"] == pytest.approx(0.05 / 2**0.5)  # of 0.7 and 0.75
    assert rows["UPR"].deviations == {} and rows["A"].against["upr"].difference["RR@10"] == pytest.approx(0.325)
    upr, first = values["UPR", 0], values["first stage", 0]
    p_a, p_r = (ttest_rel(x, upr).pvalue for x in (a, r))
    assert p_a < p_r
    assert rows["A"].against["upr"].p_holm["RR@10"] == pytest.approx(2 * p_a)
    assert rows["R"].against["upr"].p_holm["RR@10"] == pytest.approx(max(2 * p_a, p_r))
    three = sorted((ttest_rel(x, first).pvalue, name) for x, name in ((a, "A"), (r, "R"), (upr, "UPR")))
    largest = 0.0
    for factor, (p, name) in zip((3, 2, 1), three, strict=True):
        largest = max(largest, min(1.0, factor * p))
        assert rows[name].against["first_stage"].p_holm["RR@10"] == pytest.approx(largest)
    assert "first_stage" not in rows["first stage"].against and "upr" not in rows["first stage"].against
    assert rows["R"].against["upr"].gain["RR@10"] == 2 and rows["R"].against["upr"].lose["RR@10"] == 1
    text = markdown(plan, [table])
    assert "| 4. R | +0.1750 (p=" in text and ", 2:1) |" in text
    assert "| 3. A | **0.7250 ± 0.0354**†‡ |" in text, text
    assert csv_text([table]).splitlines()[3].startswith("tiny,A,2,0.725,0.0353")
    table.results[-1]["training"] = {"queries": 3}  # of the 4 that the plan asks for
    assert "R: trained on 3 queries, all that the collection gives." in quality_notes(table)
    assert not any(note.startswith("A: trained on") for note in quality_notes(table))


def test_names_of_a_plan_are_escaped_on_the_page(job, tmp_path):
    """A title, a collection, methods and an option with tags, entities and dollars in them."""
    pytest.importorskip("matplotlib")
    evil = "<script>alert('$x$')</script>&amp;"
    option = f'method: q_peft_a, learning_rate: 1, options: {{instruction: "{evil}"}}'
    changes = {
        "dtype: float32": f'title: "{evil}"',
        "  tiny:": f'  "{evil}":',
        "measures: [nDCG@10, RR@10, CandidateRecall@2]": "measures: [RR@10]",
    }
    methods = [f'"{evil}": {{{option}}}', "UPR: {method: upr}"]
    plan = read_plan(write_plan(tmp_path / "plan.yaml", job, methods, **changes))
    for cell in cells(plan, tmp_path / "out"):
        cell.folder.mkdir(parents=True)
        result = {"method": cell.method.name, "seed": cell.seed, "per_query": {"RR@10": {"a": 0.5, "b": 1.0}}}
        (cell.folder / "result.json").write_text(json.dumps(result))
    page = html(plan, build_tables(plan, tmp_path / "out"))
    assert not Tags(page).open and "<script" not in page and "&amp;amp;" in page


def test_methods_that_find_the_same_do_not_differ(job, tmp_path):
    """All methods have the same R@20 of 20 candidates; the mean of 1/5 over three seeds misses it by the last bit."""
    plan = read_plan(
        write_plan(
            tmp_path / "plan.yaml",
            job,
            ['"UPR|plain": {method: upr}', "A: {method: q_peft_a, learning_rate: 1}"],
            **{
                "measures: [nDCG@10, RR@10, CandidateRecall@2]": "measures: [R@20]",
                "seeds: [0, 1]": "seeds: [0, 1, 2]",
            },
        )
    )
    values = {str(i): value for i, value in enumerate([1 / 5, 2 / 5, 1 / 5, 1 / 10, 1 / 5, 4 / 5, 1 / 5, 1 / 5])}
    for cell in cells(plan, tmp_path / "out"):
        cell.folder.mkdir(parents=True)
        result = {"method": cell.method.name, "seed": cell.seed, "per_query": {"R@20": values}}
        (cell.folder / "result.json").write_text(json.dumps(result))
    (table,) = build_tables(plan, tmp_path / "out")
    a = next(row for row in table.rows if row.name == "A")
    assert a.seeds == 3 and a.per_query["R@20"] != values
    for against in a.against.values():
        assert (against.difference, against.p_holm) == ({"R@20": 0.0}, {"R@20": 1.0})
        assert (against.gain, against.lose) == ({"R@20": 0}, {"R@20": 0})
    text = markdown(plan, [table])
    mean = f"{sum(values.values()) / 8:.4f}"
    assert f"| 3. A | **{mean} ± 0.0000** |" in text and f"| 2. UPR\\|plain | **{mean}** |" in text
    assert "| method | R@20 against first stage | R@20 against UPR\\|plain |" in text
    assert "| 3. A | +0.0000 (p=1.000, 0:0) | +0.0000 (p=1.000, 0:0) |" in text


def test_values_that_do_not_exist_are_null(job, tmp_path):
    """One query, of which no candidate is relevant: no test, and no candidate recall; JSON has no NaN."""
    methods = ["UPR: {method: upr}", "A: {method: q_peft_a, learning_rate: 1}"]
    plan = read_plan(write_plan(tmp_path / "plan.yaml", job, methods))
    for cell in cells(plan, tmp_path / "out"):
        cell.folder.mkdir(parents=True)
        values = {"nDCG@10": {"a": 0.5}, "RR@10": {"a": 0.5}, "CandidateRecall@2": {}}
        result = {"method": cell.method.name, "seed": cell.seed, "per_query": values}
        (cell.folder / "result.json").write_text(json.dumps(result))
    tables = build_tables(plan, tmp_path / "out")

    def refuse(constant):
        raise AssertionError(constant)

    row = json.loads(json_text(tables), parse_constant=refuse)[0]["rows"][2]
    assert row["means"] == {"nDCG@10": 0.5, "RR@10": 0.5, "CandidateRecall@2": None}
    assert row["against"]["upr"]["p_holm"] == dict.fromkeys(row["means"])
    text = markdown(plan, tables)
    assert "| 3. A | **0.5000 ± 0.0000** | **0.5000 ± 0.0000** | – |" in text
    assert "| 3. A | +0.0000 (p –, 0:0) |" in text and "nan" not in text
    pytest.importorskip("matplotlib")
    first = replace(plan, measures=("CandidateRecall@2", "RR@10"))  # the first measure is plotted
    for shown in (plan, first):
        page = html(shown, build_tables(shown, tmp_path / "out"))
        assert not Tags(page).open and ">nan<" not in page


def test_candidate_recall_by_hand():
    """Relevant documents among the first k ÷ those among the candidates; queries without any do not count."""
    qrels = {"a": {"x": 1, "y": 2, "z": 0, "elsewhere": 1}, "b": {"x": 1}, "c": {"w": 1}}
    run = {"a": [("n", 3.0), ("x", 2.0), ("y", 1.0), ("z", 0.0)], "b": [("x", 1.0)], "c": [("n", 1.0)]}
    values = per_query(run, qrels, ["CandidateRecall@2", "R@2"])
    assert list(values) == ["CandidateRecall@2", "R@2"]
    assert values["CandidateRecall@2"] == {"a": 0.5, "b": 1.0}
    assert values["R@2"] == pytest.approx({"a": 1 / 3, "b": 1.0, "c": 0.0})


def test_labels_cover_neither_each_other_nor_points():

    rng = np.random.default_rng(0)
    crowd = np.concatenate([rng.normal((100, 100), 8, (12, 2)), rng.uniform(20, 180, (8, 2))])
    sizes, within = [(12.0, 9.0)] * len(crowd), (0.0, 0.0, 200.0, 200.0)
    labels = [_around(place, 12, 9) for place in label_places(crowd, sizes, within)]
    for i, label in enumerate(labels):
        assert label[0] >= 0 and label[1] >= 0 and label[2] <= 200 and label[3] <= 200
        assert all(_shared(label, other) == 0 for other in labels[i + 1 :])
        assert all(_shared(label, _around(point, 2 * _POINT, 2 * _POINT)) == 0 for point in crowd)
