"""The report, on made-up systems and texts."""

import random
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from rich.console import Console

from qpeft_ext.evaluation.comparison import compare_table
from qpeft_ext.evaluation.measures import evaluate
from qpeft_ext.evaluation.plots import mean_interval
from qpeft_ext.evaluation.report import Clue, Example, Report, html, render, segments, write_html

CODE = '''def bfs_tree(graph, source, depth_limit=None):
    """A tree of the <nodes> & edges that a breadth-first search visits."""
    tree = Graph()
    tree.add_node(source)
    for parent, children in generic_bfs_edges(graph, source, depth_limit=depth_limit):
        tree.add_edges_from((parent, child) for child in children if child not in tree)
    return tree'''


def clues(text, words):
    return [Clue(text.index(word), text.index(word) + len(word), weight) for word, weight in words]


def make_report(num_queries=60, num_systems=5):
    """Random rankings of 20 documents, the relevant one near the top more often for later systems."""
    generator = random.Random(0)
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(num_queries)}
    names = ["BM25", "similarity only", "UPR", "Q-PEFT-R", "Q-PEFT-A", "Q-PEFT-A + BM25 <&>"]
    runs = {}
    for strength, name in enumerate(names[:num_systems]):
        runs[name] = {}
        for i in range(num_queries):
            docs = [f"d{j % num_queries}" for j in range(i, i + 20)]
            place = {d: generator.gauss(0, 1) + (d == f"d{i}") * (0.8 + 0.4 * strength) for d in docs}
            runs[name][f"q{i}"] = sorted(place.items(), key=lambda item: -item[1])
    measures = ["nDCG@10", "RR@10", "Success@1", "Success@5", "Success@20"]
    table = compare_table(runs, qrels, measures)
    return Report(
        title="Search in your own Python environment",
        lead="100 docstrings of packages that no system was trained on, against 4,812 functions. "
        "The LM is frozen; only the clue modules were trained.",
        setting={
            "qpeft_ext": "0.1.0",
            "base LM": "llama, 1.9 M parameters",
            "training examples": "2,560, listwise",
            "test packages": "networkx 3.4.2, " * 12,
            "seed": "0",
        },
        table=table,
        measure="nDCG@10",
        per_query={name: evaluate(run, qrels, ["nDCG@10"]).per_query["nDCG@10"] for name, run in runs.items()},
        seconds_per_query={name: 0.004 * 3**i for i, name in enumerate(runs)},
        examples=[
            Example(
                "Build a tree from a breadth-first search & <its> source",
                "networkx.bfs_tree",
                CODE,
                clues(CODE, [("bfs", 0.91), ("tree", 0.88), ("source", 0.7), ("breadth", 0.66), ("edges", 0.3)]),
                14,
                1,
                True,
                "Q-PEFT-R",
            ),
            Example("no clue at all", "empty", "x = 1", [], None, 3, False),
            Example("long", "many", "word " * 400, [Clue(10, 14, 0.2)], 3, 3, None, "Q-PEFT-A", "A note on this one."),
        ],
        notes=["Made-up numbers."],
    )


class Tags(HTMLParser):
    """Collects tags with their attributes; checks that they nest."""

    def __init__(self, page):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page():
    return html(make_report())


def test_page_needs_nothing_else(page):
    tags = Tags(page)
    assert not tags.open
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "link", "img", "iframe", "object", "embed"}
    references = [
        value
        for _, attributes in tags.seen
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href")
    ]
    assert all(value.startswith("#") for value in references)
    assert "@import" not in page and "url(http" not in page
    start = page.index("<svg")
    ElementTree.fromstring(page[start : page.index("</svg>") + 6])


def test_page_shows_everything(page):
    report = make_report()
    for system in report.table.systems:
        for value in system.values.values():
            assert f"{value:.4f}" in page
        for value in system.difference.values():
            assert f"{value:+.4f}" in page
    for text in ("60 queries", "rank 14 before, rank 1 after", "not a candidate", "Made-up", "nDCG@10: mean of 60"):
        assert text in page
    assert page.count("<mark") == 6


def test_everything_is_escaped():
    evil = "<script>alert('x')</script>&amp;"
    report = make_report(num_systems=2)
    report.title = report.lead = evil
    report.setting = {evil: evil}
    report.notes = [evil]
    report.examples = [Example(evil, evil, evil, [Clue(3, 9, 1.0)], 1, 2, True, evil, evil)]
    report.table.systems[1].name = evil
    report.per_query = {"BM25": report.per_query["BM25"], evil: report.per_query["similarity only"]}
    page = html(report)
    assert "<script" not in page and "&amp;amp;" in page
    Tags(page)


def test_same_report_same_bytes(tmp_path, page):
    write_html(make_report(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_segments_cover_the_text():
    text = "abcdefghij"
    overlapping = [Clue(2, 5, 0.5), Clue(4, 6, 1.0), Clue(-3, 1, 0.25), Clue(8, 99, 0.1), Clue(7, 7, 9.0)]
    pieces = list(segments(text, overlapping))
    assert "".join(piece for piece, _, _ in pieces) == text
    assert [(p, s) for p, s, _ in pieces] == [("a", 0.25), ("b", 0), ("cd", 0.5), ("ef", 1.0), ("gh", 0), ("ij", 0.1)]
    assert list(segments("", [])) == []
    assert [s for _, s, _ in segments("ab", [Clue(0, 1, -1.0)])] == [0]


def test_mean_interval():
    low, high = mean_interval([0.0, 1.0] * 50)
    assert 0.38 < low < 0.43 and 0.57 < high < 0.62
    assert mean_interval([0.5]) == (0.5, 0.5)


def test_terminal():
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(render(make_report()))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "s per query" in text and "Example 3: long" in text and "'bfs' 0.91" in text and "…" in text


def test_a_token_in_several_places_is_listed_once():
    report = make_report()
    report.examples = [Example("q", "d", "sea tide sea", [Clue(0, 3, 0.5), Clue(9, 12, 0.75), Clue(4, 8, 0.25)], 1, 1)]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(render(report))
    assert "clues: 'sea' 0.75, 'tide' 0.25" in (line.strip() for line in console.export_text().splitlines())


def test_one_system_and_one_query():
    """No baseline to compare with and no variance: still a page."""
    report = make_report(num_queries=1, num_systems=1)
    assert "baseline" in html(report)
    assert "p –" in html(make_report(num_queries=1, num_systems=2))


def test_a_long_name_is_wrapped_above_the_plot():
    """The best system's name stands above the narrower plot, which would cut it."""
    report, long = make_report(), "Q-PEFT-R + generated LoRA, packaged and trained on docstrings"
    report.per_query[long] = dict.fromkeys(report.per_query["BM25"], 1.0)
    (figure,) = [part for part in html(report).split("<svg")[1:] if "gain" in part]
    lines = re.findall(r"<text[^>]*>([^<]*)</text>", figure)
    above = lines[lines.index(next(line for line in lines if line.endswith("lose"))) - 3 :][:3]
    assert above == ["Q-PEFT-R + generated LoRA, packaged", "and trained on docstrings", "against BM25"]


def test_the_title_of_a_narrow_plot_stays_within_the_figure():
    """The names of the systems take half of the width; the best one's name stands above what is left for its plot."""
    textpath, fonts = pytest.importorskip("matplotlib.textpath"), pytest.importorskip("matplotlib.font_manager")
    report, long = make_report(), "Q-PEFT-R + generated LoRA + BM25"
    report.per_query[long] = dict.fromkeys(report.per_query["BM25"], 1.0)
    (figure,) = [part for part in html(report).split("<svg")[1:] if "gain" in part]
    right = float(re.search(r'viewBox="0 0 (\S+) ', figure)[1])
    places = re.findall(r'<text [^>]*transform="translate\((\S+) [^)]*\)">([^<]*)</text>', figure)
    (title,) = [float(x) for x, text in places if text == long and float(x) > right / 2]
    font = fonts.FontProperties(family="DejaVu Sans")
    assert title + textpath.TextPath((0, 0), long, size=10, prop=font).get_extents().width <= right
