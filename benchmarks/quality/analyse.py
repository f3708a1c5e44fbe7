"""What stored scores say, without running the LM: temperature, fusion with BM25, where adapters help and hurt.

    python benchmarks/quality/analyse.py dev attention generated      # a split and names of experiments
"""

from __future__ import annotations

import json
import sys

import numpy as np
from collection import Split, ndcg
from experiment import FOLDER, compare, places


def per_query(path, split: Split) -> list[np.ndarray]:
    return np.split(np.load(path)["values"], np.cumsum([len(split.run[q]) for q in split.found()])[:-1])


def listwise_loss(scores: list[np.ndarray], where: list[int], temperature: float) -> float:
    logits = [row / temperature for row in scores]
    return float(np.mean([np.logaddexp.reduce(row) - row[i] for row, i in zip(logits, where, strict=True)]))


def main(part: str, names: list[str]) -> None:
    split = Split(**json.loads((FOLDER / f"{part}.json").read_text()))
    ids, where = split.found(), places(split)
    upr = per_query(FOLDER / f"upr-{part}.npz", split)
    bm25 = [np.array([score for _, score in split.run[q]]) for q in ids]
    length = [np.array([np.log(1 + len(split.documents[d]["text"])) for d, _ in split.run[q]]) for q in ids]
    systems = {name: per_query(FOLDER / f"scores-{part}-{name}.npz", split) for name in names}

    def show(what: str, scores: list[np.ndarray], baseline: list[np.ndarray]) -> None:
        r = compare(scores, baseline, split)
        print(f"{what:44s} nDCG@10 {r['ndcg']:.4f} {r['difference']:+.4f} p={r['p']:.1e} {r['wins']}/{r['losses']}")

    def plus(scores: list[np.ndarray], other: list[np.ndarray], weight: float) -> list[np.ndarray]:
        return [a + weight * b for a, b in zip(scores, other, strict=True)]

    def centred(rows: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([row - row.mean() for row in rows])

    print(f"{len(split.queries)} queries, {len(ids)} found; listwise loss of UPR at each temperature:",
          {t: round(listwise_loss(upr, where, t), 2) for t in (0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.8)})  # fmt: skip
    show("UPR − 0.1 log length, against UPR", plus(upr, length, -0.1), upr)
    show("UPR + 0.05 BM25, against UPR", plus(upr, bm25, 0.05), upr)
    for name, scores in systems.items():
        print(f"{name}: listwise loss", {t: round(listwise_loss(scores, where, t), 2) for t in (0.1, 0.25, 0.5)})
        show(f"{name}, against UPR", scores, upr)
        show(f"{name} + 0.05 BM25, against UPR + 0.05 BM25", plus(scores, bm25, 0.05), plus(upr, bm25, 0.05))
        show(f"{name} + UPR, against UPR", plus(scores, upr, 1), upr)
        change = centred(scores) - centred(upr)
        print("  correlation of the change, within queries:", {
            what: round(float(np.corrcoef(change, centred(rows))[0, 1]), 2)
            for what, rows in (("UPR", upr), ("BM25", bm25), ("log length", length))
        })  # fmt: skip
        package, difference = np.array([q.partition(".")[0] for q in ids]), ndcg(scores, where) - ndcg(upr, where)
        for own in np.unique(package):
            values = difference[package == own]
            error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            print(f"  {own}: {len(values)} found queries, difference {values.mean():+.3f} ± {error:.3f}")
        before, after = (
            np.array([(row >= row[i]).sum() for row, i in zip(rows, where, strict=True)]) for rows in (upr, scores)
        )
        order = np.argsort(after - before, kind="stable")
        for i in (*order[:3], *order[-3:]):
            print(f"  rank {before[i]} → {after[i]}  {split.queries[ids[i]][:70]}  ({ids[i]})")
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            show(f"{first} + {second}, against {first}", plus(systems[first], systems[second], 1), systems[first])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
