"""Harvesting a search collection from installed packages."""

import json
import textwrap

import pytest

from qpeft_ext.demo import harvest as module
from qpeft_ext.demo.harvest import harvest, write_beir
from qpeft_ext.demo.sentences import first_sentence

pytestmark = pytest.mark.slow


FILES = {
    "alpha/__init__.py": '''
        def shortest_route(graph, start, goal):
            """Compute the shortest route between two places of a map.

            More text that is no query, shortest or not.
            """
            routes = explore(graph, start)
            return routes[goal]  # a comment stays

        def short(x):
            """Too short."""
            return x + 1

        def undocumented(x):
            return x * 2

        def stub(x):
            """Raise an error because nothing is implemented here yet."""
            raise NotImplementedError
    ''',
    "alpha/shapes.py": '''
        class LlamaShape:
            """A shape that knows its own area and its border."""

            def area(self):
                """Return the area of the shape in square metres."""
                return self.width * self.height

            def border(self):
                """Return the length of the border in whole metres."""
                total = self.width + self.height
                return 2 * total

            @property
            def colour(self):
                """The colour that the shape is painted with on screen."""
                return self._colour

            @colour.setter
            def colour(self, value):
                """Paint the shape with another colour, right now please."""
                self._colour = value
    ''',
    "beta.py": '''
        class MistralShape:
            """An independent sentence about a shape that was copied."""

            def area(self):
                """Other words for what this copied function gives back."""
                return self.width * self.height

            def border(self):
                result = self.width + self.height
                return 2 * result

            @property
            def colour(self):
                return self._colour

            @colour.setter
            def colour(self, value):
                self._colour = value

        def first(x):
            """Do the very same thing as the other function does."""
            return x + 100

        def second(x):
            """Do the very same thing as the other function does."""
            return x + 200
    ''',
    "gamma/__init__.py": "",
    "gamma/broken.py": "def f(:\n",
    "gamma/undecodable.py": b"# \xff\xfe\nx = 1\n",
    "gamma/tests/test_it.py": '''
        def helper(x):
            """Check that the helper of the tests is left out."""
            return x + 300
    ''',
    "gamma/_vendor/copied.py": '''
        def vendored(x):
            """Check that copies of other packages are left out."""
            return x + 400
    ''',
}


@pytest.fixture
def packages(tmp_path):
    for name, content in FILES.items():
        path = tmp_path / "packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else textwrap.dedent(content).encode())
    return [str(tmp_path / "packages")]


def read(packages, *names):
    return harvest(names, search_path=packages, show_progress_bar=False)


def test_a_document_is_the_source_without_docstrings(packages):
    collection = read(packages, "alpha")
    route = collection.documents["alpha.shortest_route"]
    assert route["title"] == route["id"] == "alpha.shortest_route"
    assert route["text"] == (
        "def shortest_route(graph, start, goal):\n    routes = explore(graph, start)\n"
        "    return routes[goal]  # a comment stays"
    )
    assert collection.queries["alpha.shortest_route"] == "Compute the shortest route between two places of a map"
    assert collection.qrels["alpha.shortest_route"] == {"alpha.shortest_route": 1}
    shape = collection.documents["alpha.shapes.LlamaShape"]["text"]
    assert '"""' not in shape and "return self.width * self.height" in shape  # nor the docstrings of its methods
    assert collection.documents["alpha.shapes.LlamaShape.area"]["text"].startswith("def area(self):\n    return")


def test_what_is_left_out(packages):
    collection = read(packages, "alpha", "gamma", "missing")
    assert "alpha.undocumented" not in collection.documents
    assert "alpha.stub" not in collection.documents
    assert "alpha.short" in collection.documents and "alpha.short" not in collection.queries
    assert collection.queries["alpha.shapes.LlamaShape.colour"].startswith("The colour")  # the getter, not the setter
    assert not any(name.startswith("gamma") for name in collection.documents)  # tests and vendored copies
    assert collection.counts["unreadable_files"] == 2
    assert collection.counts["packages_not_installed"] == 1
    assert set(collection.versions) == {"alpha", "gamma"}


def test_copies_with_other_names_are_one_document(packages):
    collection = read(packages, "alpha", "beta")
    assert "beta.MistralShape" not in collection.documents
    assert "beta.MistralShape.area" not in collection.documents
    assert collection.counts["duplicate_documents"] == 2


def test_different_code_is_not_a_copy(packages):
    assert {"beta.first", "beta.second"} <= set(read(packages, "beta").documents)


def test_repeated_queries_are_dropped_and_their_documents_stay(packages):
    collection = read(packages, "beta")
    assert not {"beta.first", "beta.second"} & set(collection.queries)
    assert collection.counts["repeated_queries"] == 2


def test_the_order_of_files_does_not_matter(packages):
    first, second = read(packages, "alpha", "beta"), read(packages, "alpha", "beta")
    assert list(first.documents.items()) == list(second.documents.items())
    assert first.counts == second.counts


@pytest.mark.parametrize(
    "docstring, expected",
    [
        ("Return the sum of all elements. And more.", "Return the sum of all elements"),
        ("foo(x, y) -> Tensor\n\nApplies a linear layer to the input.", "Applies a linear layer to the input"),
        ("Build a :class:`~torch.Tensor` out of the ``given`` numbers.", "Build a Tensor out of the given numbers"),
        ("Reads files, e.g. Text, line by\n    line from a disk.", "Reads files, e.g. Text, line by line from a disk"),
        ("Too short.", None),
        ("Deprecated, use the other function of this module instead.", None),
        (">>> print(one, two, three, four, five, six)", None),
        ("word " * 31, None),
        ("", None),
    ],
)
def test_first_sentence(docstring, expected):
    assert first_sentence(docstring) == expected


def test_standard_library_module():
    collection = harvest(["heapq"], show_progress_bar=False)
    assert "heapq.nlargest" in collection.documents
    assert collection.queries["heapq.nlargest"] == "Find the n largest elements in a dataset"
    assert collection.counts["files"] == 1


def test_train_dev_and_test_packages_do_not_overlap():
    sides = [set(module.TRAIN_PACKAGES), set(module.DEV_PACKAGES), set(module.TEST_PACKAGES)]
    assert len(set.union(*sides)) == sum(map(len, sides))
    assert "qpeft_ext" not in set.union(*sides)


def test_demo_collection_holds_out_copies(packages, monkeypatch):
    monkeypatch.syspath_prepend(packages[0])
    monkeypatch.setattr(module, "TRAIN_PACKAGES", ("beta",))
    monkeypatch.setattr(module, "DEV_PACKAGES", ("gamma",))
    monkeypatch.setattr(module, "TEST_PACKAGES", ("alpha",))
    demo = module.demo_collection(seed=1, test_queries=2, show_progress_bar=False)
    assert len(demo.test.queries) == 2 and len(demo.test.documents) > 2
    assert "beta.MistralShape" not in demo.train.documents
    assert demo.train.counts["also_in_held_out_packages"] == 2
    assert module.demo_collection(seed=1, test_queries=2, show_progress_bar=False).test.queries == demo.test.queries


def test_write_beir(packages, tmp_path):
    collection = read(packages, "alpha")
    folder = write_beir(collection, tmp_path / "beir")
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    assert {row["_id"]: row["text"] for row in rows} == {id: d["text"] for id, d in collection.documents.items()}
    qrels = (folder / "qrels" / "test.tsv").read_text().splitlines()
    assert qrels[0] == "query-id\tcorpus-id\tscore" and len(qrels) == 1 + len(collection.queries)
    assert not list(folder.rglob("*.unfinished"))
