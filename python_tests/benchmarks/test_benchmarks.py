"""Measurements become tables, pictures and verdicts."""

import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("benchmarks/ is not here", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

common, markers, readme_tables, result_file, sass_check = (
    pytest.importorskip(name) for name in ("common", "markers", "readme_tables", "result_file", "sass_check")
)


def row(work, ours=2.0, **baselines):
    return {
        "work": work,
        "ours_ms": ours,
        "baselines_ms": baselines,
        "ratio": {name: ms / ours for name, ms in baselines.items()},
        "ours_peak_bytes": 3_000_000,
        "baselines_peak_bytes": {name: 0 for name in baselines},
        "bound_share": 0.5,
        "max_error": 0.0,
        "bound": {"bytes": 1e6, "flops": 1e9, "by": "copy"},
        "not_run": {"liger": "not installed"},
    }


@pytest.fixture
def gpu_result(tmp_path):
    result = {
        "machine": "NVIDIA H200",
        "device": "cuda",
        "threads": 1,
        "versions": {"torch": "2.11"},
        "commit": None,
        "command": "bash benchmarks/gpu_check.sh",
        "date": "2026-11-23",
        "rates": {"copy": 4e12, "gemm": 8e14},
        "rows": [row("similarity_topk/1x100", textbook=9.0, same=1.0), row("similarity_topk/1x100@qwen2.5-7b", a=3.0)],
    }
    path = tmp_path / "h200_ops.json"
    path.write_text(json.dumps(result))
    return path


def test_table_with_and_without_a_gpu_result(gpu_result, monkeypatch):
    monkeypatch.setattr(readme_tables, "RESULTS", gpu_result.parent)
    assert readme_tables.table("h200_ops").splitlines()[:3] == [
        "| work | ours, ms | of the bound | ours, MB | textbook | same |",
        "|---|---|---|---|---|---|",
        "| `similarity_topk/1x100` | 2.0 | 50% | 3 | 9.0 (4.50×) | 1.0 (**0.50×**) |",  # a loss is seen
    ]
    assert "`liger` (not installed)" in readme_tables.table("h200_ops")
    gpu_result.unlink()
    assert "Not run yet" in readme_tables.table("h200_ops")


def test_the_pages_show_the_committed_results(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["readme_tables.py", "--check"])
    assert readme_tables.main() == 0
    shown = markers.names("results")
    assert len(shown) == len(set(shown)), "a table is on two pages"
    assert sorted(markers.names("quality")) == sorted(readme_tables.QUALITY)
    assert len(markers.names("demo")) == 2  # with the pretrained LM, and with the small one of the package


def test_the_readme_fits_on_a_screen_or_two():
    assert len((BENCHMARKS.parent / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A README and a page with a marked table each."""
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(markers, "ROOT", tmp_path)
    for name, table in (("README.md", "a"), ("docs/page.md", "b")):
        (tmp_path / name).write_text(f"before\n<!-- kind: {table} -->\nold\n<!-- end -->\nafter\n")
    return tmp_path


def test_tables_are_written_between_their_markers(pages, capsys):
    def make(name, page):
        return f"{name} of {page.name}\n"

    outdated = markers.write_tables("kind", make, check=True)
    assert [page.name for page in outdated] == ["README.md", "page.md"]
    assert "old" in (pages / "README.md").read_text() and markers.report(outdated, True, "x.py") == 1
    assert "docs/page.md" in capsys.readouterr().out

    assert markers.report(markers.write_tables("kind", make, check=False), False, "x.py") == 0
    assert (pages / "docs/page.md").read_text() == "before\n<!-- kind: b -->\nb of page.md\n<!-- end -->\nafter\n"
    assert markers.write_tables("kind", make, check=True) == []
    assert markers.names("kind") == ["a", "b"] and markers.names("other") == []


def test_pictures_are_linked_from_where_the_page_is(gpu_result, monkeypatch):
    monkeypatch.setattr(readme_tables, "RESULTS", gpu_result.parent)
    gpu_result.with_suffix(".png").touch()
    assert "](h200_ops.png)" in readme_tables.table("h200_ops", gpu_result.parent / "README.md")
    assert "](../h200_ops.png)" in readme_tables.table("h200_ops", gpu_result.parent / "docs" / "page.md")


def test_quality_table(tmp_path, monkeypatch):
    def result(method, mean, deviation=None, **against):
        return {
            "method": method,
            "means": {"nDCG@10": mean},
            "deviations": {} if deviation is None else {"nDCG@10": deviation},
            "against": {to: {"difference": {"nDCG@10": d}, "p_holm": {"nDCG@10": p}} for to, (d, p) in against.items()},
        }

    rows = [
        result("first stage", 0.4),
        result("UPR", 0.5),
        result("Q-PEFT-R + generated LoRA", 0.9, upr=(0.4, 0.5)),  # trained on fewer queries: not shown
        result("Q-PEFT-R + generated LoRA, 2560", 0.45, 0.0123, upr=(-0.05, 2e-5)),
        result("Q-PEFT-A + generated LoRA, 2560, + BM25", 0.41, first_stage=(0.01, 0.06)),
    ]
    (tmp_path / "q.json").write_text(json.dumps([{"collection": "squad", "rows": rows}]))
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    monkeypatch.setattr(readme_tables, "COLLECTIONS", {"squad": ("SQuAD", "q")})
    monkeypatch.setattr(readme_tables, "QUALITY", {"summary": (("squad",), {"BM25": "first stage", "UPR": "UPR"})})
    assert readme_tables.quality("summary").splitlines()[2] == (
        "| SQuAD | 0.400 | **0.500** | 0.450 ± 0.012 | −0.050 (p=2e-5) | 0.410 (Q-PEFT-A) | +0.010 (p=0.06) |"
    )


def test_demo_table(tmp_path, monkeypatch):
    systems = [
        {"name": "BM25", "values": {"nDCG@10": 0.25, "RR@10": 0.5}, "p_holm": {}},
        {"name": "UPR", "values": {"nDCG@10": 0.5, "RR@10": 0.25}, "p_holm": {"nDCG@10": 0.003, "RR@10": 1.0}},
    ]
    (tmp_path / "demo.json").write_text(json.dumps({"measures": ["nDCG@10", "RR@10"], "systems": systems}))
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    assert readme_tables.demo("demo").splitlines() == [
        "| system | nDCG@10 | RR@10 |",
        "|---|---|---|",
        "| BM25 | 0.250 | 0.500 |",
        "| UPR | 0.500 (p=0.003) | 0.250 |",
    ]


def test_roofline(gpu_result, tmp_path):
    roofline = pytest.importorskip("roofline", reason="matplotlib is missing", exc_type=ImportError)
    result = json.loads(gpu_result.read_text())
    assert roofline.points(result)[0] == ("similarity_topk/1x100", 1000, 5e11, 1e12)  # 1e9 FLOPs in 2 ms and in 1 ms
    assert roofline.plot(result, tmp_path / "h200_ops.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no measured rates"):
        roofline.plot({"rows": []}, tmp_path / "none.png")


SASS = """
arch = sm_90a
\t\tFunction : _ZN24_similarity_topk_kernel_cu_tile
        /*0000*/  LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0010*/  HMMA.16816.F32.BF16 R4, R8, R6, R4 ;
\t\tFunction : _ZN22_clue_attention_kernel_cu_tile
        /*0000*/  LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0010*/  HMMA.16816.F32 R4, R8, R6, R4 ;
\t\tFunction : _ZN28_token_log_likelihood_kernel_cu_chunk
        /*0000*/  LDG.E.128 R4, [R2.64] ;
"""


@pytest.mark.parametrize(
    "change, wrong",
    [
        (("", ""), []),
        (("HMMA.16816.F32.BF16", "FFMA"), ["sm_90a: similarity_topk has no tensor cores"]),
        (("LDG.E.128 R4", "LDG.E.64 R4"), ["sm_90a: token_log_likelihood has no 16-byte loads"]),
        (
            ("LDG.E.128 R4", "LDL.128 R4"),
            [
                "sm_90a: _ZN28_token_log_likelihood_kernel_cu_chunk uses local memory",
                "sm_90a: token_log_likelihood has no 16-byte loads",
            ],
        ),
        ((SASS, ""), ["no machine code found"]),
    ],
)
def test_machine_code(change, wrong):
    assert sass_check.check(SASS.replace(*change) if change[0] else SASS)[1] == wrong


def test_names_of_works():
    found = common.works("similarity_topk", lambda *arguments: arguments)
    assert found["similarity_topk/1x100"] == (1, 100, False, 4096, 32000, False)
    assert found["similarity_topk/32x100/backward@qwen2.5-0.5b"] == (32, 100, False, 896, 151936, True)
    assert len(found) == 24


def test_measure_says_what_it_measured():
    x = torch.ones(4)
    case = common.Case([x], torch.exp, {"textbook": torch.exp}, lambda a, b: float((a - b).abs().max()), 1e9, 1e6)
    measured = common.measure("op/tiny", case, torch.device("cpu"), 3, common.Rates(1e9, 1e9))
    assert measured["bound"]["by"] == "copy" and measured["bound_share"] == pytest.approx(1e3 / measured["ours_ms"])
    assert measured["max_error"] == 0 and measured["timing"] == {"ours": "wall", "textbook": "wall"}
    wrong = case._replace(error=lambda a, b: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # nothing is timed that is not right
        common.measure("op/tiny", wrong, torch.device("cpu"), 3, common.Rates(1e9, 1e9))


def test_a_result_file_keeps_the_rows_of_other_works(tmp_path, monkeypatch):
    monkeypatch.setattr(result_file, "RESULTS", tmp_path)
    monkeypatch.setattr(result_file, "cpu_name", lambda: "A CPU (R) 1")
    monkeypatch.setattr(result_file, "vectors", lambda: "AVX2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench_op.py", "--repeats", "2"])
    arguments = SimpleNamespace(out=None, device=torch.device("cpu"))
    path = result_file.save(arguments, "op", [row("op/a"), row("op/b")], common.Rates(1e9, 1e9))
    assert path == tmp_path / "a-cpu-r-1-avx2-3_op.json"
    result_file.save(arguments, "op", [row("op/b", ours=5.0)])
    content = json.loads(path.read_text())
    assert {found["work"]: found["ours_ms"] for found in content["rows"]} == {"op/a": 2.0, "op/b": 5.0}
    assert content["command"] == "python benchmarks/bench_op.py --repeats 2" and content["threads"] == 3
    assert content["instructions"] == "AVX2"
    assert content["rates"] == {"copy": 1e9, "gemm": 1e9}  # those of the earlier run


def test_the_script_for_a_gpu_imports_what_is_there():
    script = (BENCHMARKS / "gpu_check.sh").read_text()
    imports = re.findall(r"^from (\w+) import (\w+)$", script, re.M)
    assert imports and all(hasattr(importlib.import_module(module), name) for module, name in imports)
    named = re.findall(r"benchmarks/(bench_[\w$]+|\w+_check|roofline)\.py", script)
    assert named and all("$" in name or (BENCHMARKS / f"{name}.py").is_file() for name in named)


def test_the_random_llama_reads_unknown_words():
    """Documents of `bench_reranking_limits.py` begin with a word of their own."""
    tokenizer = importlib.import_module("random_llama").make_tokenizer(20)
    assert tokenizer("n7 w5 w6", add_special_tokens=False).input_ids == [0, 5, 6]
