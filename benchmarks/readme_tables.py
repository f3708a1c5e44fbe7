"""Write the tables of README.md and docs/*.md from benchmarks/results/*.json, between their markers (`markers.py`).

python benchmarks/readme_tables.py          rewrite
python benchmarks/readme_tables.py --check  fail if a page does not show what the results say
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import markers

RESULTS = Path(__file__).parent / "results"

# the collections of the quality tables: what they are called, the file with their results, and their name in it if it
# is another
COLLECTIONS = {
    "squad-smollm2": ("SQuAD, 500 questions", "quality_pretrained", "squad"),
    "docstrings-smollm2": ("docstrings, 500 queries (float32)", "quality_pretrained_float32", "docstrings"),
    "scifact-from-squad-smollm2": (
        "SciFact, 300 claims; trained on SQuAD",
        "quality_pretrained",
        "scifact, from SQuAD",
    ),
    "dl19-from-squad-smollm2": ("TREC DL 2019, 43 queries; trained on SQuAD", "quality_pretrained", "dl19, from SQuAD"),
    "dl19-smollm2": ("TREC DL 2019, 43 queries; trained on MS MARCO", "quality_pretrained", "dl19"),
    "squad-from-marco-smollm2": (
        "SQuAD, 500 questions; trained on MS MARCO",
        "quality_pretrained",
        "squad, from MS MARCO",
    ),
    "scifact-from-marco-smollm2": (
        "SciFact, 300 claims; trained on MS MARCO",
        "quality_pretrained",
        "scifact, from MS MARCO",
    ),
    "docstrings-from-marco-smollm2": (
        "docstrings, 500 queries; trained on MS MARCO",
        "quality_pretrained",
        "docstrings, from MS MARCO",
    ),
    "cosqa-from-marco-smollm2": (
        "CoSQA, 500 queries; trained on MS MARCO",
        "quality_pretrained",
        "cosqa, from MS MARCO",
    ),
    "cosqa-smollm2": (
        "CoSQA, 500 queries; trained on docstrings (float32)",
        "quality_pretrained_float32",
        "cosqa, from docstrings",
    ),
    "dl19-from-docstrings-smollm2": (
        "TREC DL 2019, 43 queries; trained on docstrings (float32)",
        "quality_pretrained_float32",
        "dl19, from docstrings",
    ),
    "squad": ("SQuAD, 1,000 questions", "quality_prose"),
    "docstrings": ("docstrings, 3,803 queries", "quality_docstrings"),
    "cosqa": ("CoSQA, 500 queries", "quality_cosqa"),
    "dl19": ("TREC DL 2019, 43 queries", "quality_prose"),
    "scifact": ("SciFact, 300 claims", "quality_prose"),
    "squad-100": ("SQuAD, 300 questions", "quality_prose_100"),
    "scifact-100": ("SciFact, 300 claims", "quality_prose_100"),
    "docstrings-100-all": ("docstrings, 3,803 queries", "quality_docstrings_100"),
}
FIVE = ("squad", "docstrings", "cosqa", "dl19", "scifact")
PRETRAINED = (
    "squad-smollm2",
    "scifact-from-squad-smollm2",
    "docstrings-smollm2",
    "cosqa-smollm2",
    "dl19-from-squad-smollm2",
    "dl19-from-docstrings-smollm2",
)
FROM_MARCO = (
    "squad-from-marco-smollm2",
    "scifact-from-marco-smollm2",
    "docstrings-from-marco-smollm2",
    "cosqa-from-marco-smollm2",
    "dl19-smollm2",
)
OURS = "Q-PEFT-R + generated LoRA"
UNTRAINED = {"BM25": "first stage", "similarity, no LM": "similarity", "UPR": "UPR", "hard clues": "hard clues"}
TRAINED = {"soft prompt": "soft prompt", "LoRA": "LoRA", "generated LoRA": "generated LoRA"}
# table -> (collections, columns before ours)
QUALITY = {
    "summary": (
        ("squad-smollm2", "docstrings-smollm2", *FROM_MARCO),
        {"BM25": "first stage", "UPR": "UPR", "LoRA": "LoRA"},
    ),
    "pretrained": (
        PRETRAINED,
        {
            "BM25": "first stage",
            "UPR": "UPR",
            "hard clues": "hard clues",
            "LoRA": "LoRA",
            "generated LoRA": "generated LoRA",
        },
    ),
    "from-marco": (FROM_MARCO, {"BM25": "first stage", "UPR": "UPR"}),
    "five": (FIVE, UNTRAINED | TRAINED),
    "100-candidates": (("squad-100", "scifact-100", "docstrings-100-all"), UNTRAINED | TRAINED),
}


def main() -> int:
    check = "--check" in sys.argv
    outdated = markers.write_tables("results", table, check)
    outdated += markers.write_tables("runtimes", lambda name, page: runtimes(name), check)
    outdated += markers.write_tables("quality", lambda name, page: quality(name), check)
    outdated += markers.write_tables("demo", lambda name, page: demo(name), check)
    return markers.report(outdated, check, "benchmarks/readme_tables.py")


# -- speed ---------------------------------------------------------------------------------------------------------


def table(name: str, page: Path = markers.ROOT / "README.md") -> str:
    """Markdown of one result file: our time, the others' with the ratio, losses in bold. A file that is not there yet:
    a line that says so. Of a file with several models (``work@model``) the rows of the first, and those in bf16.
    """
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return f"**Not run yet**: there is no `benchmarks/results/{name}.json`.\n"
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in result["rows"] if row["work"].partition("@")[2] in ("", "bf16")]
    on_gpu = result["device"] != "cpu"
    names = list(dict.fromkeys(baseline for row in rows for baseline in row["baselines_ms"]))
    heads = ["work", "ours, ms", *(["of the bound", "ours, MB"] if on_gpu else []), *names]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        share = row["bound_share"]
        extra = ["–" if share is None else f"{share:.0%}", f"{row['ours_peak_bytes'] / 1e6:,.0f}"] if on_gpu else []
        cells = [_ms(row["ours_ms"]), *extra, *(_against(row, baseline) for baseline in names)]
        lines.append(f"| `{row['work']}` | {' | '.join(cells)} |")
    origin = _origin(result)
    lines += ["", f"{origin} Each cell: milliseconds, and how many times ours (below 1, in bold, they are faster)."]
    missing = {baseline: why for row in rows for baseline, why in row.get("not_run", {}).items() if on_gpu}
    if missing:
        lines[-1] += " Not run: " + "; ".join(f"`{baseline}` ({why})" for baseline, why in missing.items()) + "."
    if (picture := path.with_suffix(".png")).is_file():
        lines += ["", f"![roofline]({Path(os.path.relpath(picture, page.parent)).as_posix()})"]
    return "\n".join(lines) + "\n"


def _origin(result: dict) -> str:
    """Return the machine, the versions and the command of a result file, as a sentence."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    with_ = f" with {result['instructions']}" if result.get("instructions") else ""
    on_gpu = result["device"] != "cpu"
    machine = result["machine"] if on_gpu else f"{result['machine']}{with_}, {result['threads']} threads"
    return f"{machine}, {versions}; `{result['command']}`, {result['date'][:10]}."


def runtimes(name: str) -> str:
    """Markdown of a result of bench_runtimes.py: for each system its speed and what its rounding changes."""
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    rates: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        kind, own = row["work"].removeprefix("rerank_").split("/")
        rates.setdefault(kind, {}).update({own if b == "ours" else b: x for b, x in row["pairs_per_second"].items()})
    lines = ["| system | cold, pairs/s | warm, pairs/s | change, nats per token | τ |", "|---|---:|---:|---:|---:|"]
    for system, losses in result["rows"][0]["quality"].items():
        cells = [f"{rates[kind][system]:.1f}" if system in rates[kind] else "–" for kind in ("cold", "warm")]
        called = f"**ours**, {system}" if system in ("float32", "int8") else f"`{system}`"
        lines.append(f"| {called} | {' | '.join(cells)} | {losses['mean_error']:.3f} | {losses['tau']:.2f} |")
    return "\n".join([*lines, "", _origin(result)]) + "\n"


def _against(row: dict, baseline: str) -> str:
    time = row["baselines_ms"].get(baseline)
    if time is None:
        return "–"
    ratio = row["ratio"][baseline]
    return f"{_ms(time)} ({ratio:.2f}×)" if ratio >= 1 else f"{_ms(time)} (**{ratio:.2f}×**)"


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


# -- quality -------------------------------------------------------------------------------------------------------


def quality(name: str) -> str:
    """Markdown of one quality table: nDCG@10 of methods on collections, from the tables of ``qpeft compare``.

    Of a trained method the row with the most training queries. The best of the columns from UPR on is bold, and so is
    a fusion that is better than BM25 with p < .05. p-values are those of the result files: Holm-corrected.
    """
    collections, columns = QUALITY[name]
    heads = ["nDCG@10", *columns, OURS, "against UPR", "fused with BM25", "against BM25"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for collection in collections:
        label, file, *named = COLLECTIONS[collection]
        rows = _rows(file, *named or [collection])
        found = {head: _most_trained(rows, method) for head, method in columns.items()} | {
            OURS: _most_trained(rows, OURS)
        }
        means = {head: row["means"]["nDCG@10"] for head, row in found.items() if row}
        first = list(columns).index("UPR")
        best = max(round(means[head], 3) for head in [*columns, OURS][first:] if head in means)
        cells = [_mean(found[head], best if i >= first else None) for i, head in enumerate([*columns, OURS])]
        cells += [_difference(found[OURS], "upr"), *_fused(rows)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rows(file: str, collection: str) -> dict[str, dict]:
    """Rows of a collection by the name of their method."""
    tables = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
    return {row["method"]: row for one in tables if one["collection"] == collection for row in one["rows"]}


def _most_trained(rows: dict[str, dict], method: str) -> dict | None:
    return rows.get(f"{method}, 2560") or rows.get(method)


def _mean(row: dict | None, best: float | None) -> str:
    if row is None:
        return "–"
    mean, deviation = row["means"]["nDCG@10"], row["deviations"].get("nDCG@10")
    shown = f"**{mean:.3f}**" if best is not None and round(mean, 3) == best else f"{mean:.3f}"
    return shown if deviation is None else f"{shown} ± {deviation:.3f}"


def _difference(row: dict, to: str) -> str:
    """The difference to another row, with its p-value."""
    against = row["against"][to]
    sign = "+" if (difference := against["difference"]["nDCG@10"]) >= 0 else "−"
    return f"{sign}{abs(difference):.3f} ({_p_value(against['p_holm']['nDCG@10'])})"


def _p_value(p: float) -> str:
    return "p<1e-9" if p < 1e-9 else f"p={p:.2g}".replace("e-0", "e-")


def _fused(rows: dict[str, dict]) -> tuple[str, str]:
    """The fusion of our method with BM25; of Q-PEFT-A where that one was not fused, and then its name."""
    for method in (OURS, OURS.replace("-R", "-A")):
        if row := rows.get(f"{method}, 2560, + BM25") or rows.get(f"{method}, + BM25"):
            name = "" if method == OURS else f" ({method.partition(' ')[0]})"
            significant = row["against"]["first_stage"]["p_holm"]["nDCG@10"] < 0.05
            best = round(row["means"]["nDCG@10"], 3) if significant else None
            return _mean(row, best) + name, _difference(row, "first_stage")
    return "–", "–"


def demo(name: str) -> str:
    """Markdown of a result of ``make demo``: all measures, and the p-value of the first against the first stage."""
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    measures = result["measures"]
    lines = [f"| {' | '.join(['system', *measures])} |", "|---" * (1 + len(measures)) + "|"]
    for system in result["systems"]:
        cells = [f"{system['values'][measure]:.3f}" for measure in measures]
        if measures[0] in system["p_holm"]:
            cells[0] += f" ({_p_value(system['p_holm'][measures[0]])})"
        lines.append(f"| {' | '.join([system['name'], *cells])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
