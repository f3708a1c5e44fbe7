"""A picture of a result file: what each work reached against what the machine could do.

    python benchmarks/roofline.py benchmarks/results/h100-80gb-hbm3_ops.json      writes the .png beside it

Across: FLOPs ÷ bytes of the bound (DESIGN 8). Up: FLOP a second, ours and the fastest baseline. The roof is the copy
rate and the GEMM rate measured in the same run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

MARKS = {"similarity_topk": "o", "clue_attention": "s", "token_log_likelihood": "^"}


def points(result: dict) -> list[tuple[str, float, float, float | None]]:
    """(work, FLOPs a byte, FLOP a second of ours, of the fastest baseline or None)"""
    found = []
    for row in result["rows"]:
        bound = row.get("bound")
        if not bound or not bound["flops"]:
            continue
        fastest = min(row["baselines_ms"].values(), default=None)
        rate = None if fastest is None else bound["flops"] / fastest * 1e3
        found.append((row["work"], bound["flops"] / bound["bytes"], bound["flops"] / row["ours_ms"] * 1e3, rate))
    return found


def plot(result: dict, path: Path) -> Path:
    """Raises: ValueError if the file has no rates or no row with a bound."""
    drawn, rates = points(result), result.get("rates")
    if not drawn or not rates:
        raise ValueError(f"{path.stem}: no measured rates, or no row with a bound; measure again with bench_<op>.py")
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    low, high = min(x for _, x, *_ in drawn) / 2, max(x for _, x, *_ in drawn) * 2
    knee = rates["gemm"] / rates["copy"]
    across = sorted({low, min(max(knee, low), high), high})
    axes.plot(across, [min(x * rates["copy"], rates["gemm"]) for x in across], color="black", linewidth=1)
    axes.text(low, low * rates["copy"], f" {rates['copy'] / 1e12:.2f} TB/s", va="bottom", rotation=0, fontsize=8)
    axes.text(high, rates["gemm"], f"{rates['gemm'] / 1e12:.3g} TFLOP/s", va="bottom", ha="right", fontsize=8)
    for op, mark in MARKS.items():
        some = [p for p in drawn if p[0].split("/")[0] == op]
        ours = axes.plot([p[1] for p in some], [p[2] for p in some], mark, label=op)[0]
        others = [p for p in some if p[3] is not None]
        axes.plot([p[1] for p in others], [p[3] for p in others], mark, fillstyle="none", color=ours.get_color())
    for work, x, y, _ in drawn:
        if "@" not in work:
            axes.annotate(work.split("/", 1)[-1], (x, y), fontsize=6, xytext=(4, 3), textcoords="offset points")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOPs a byte (bound)",
        ylabel="FLOP/s",
        title=f"{result['machine']}: ours (filled), the fastest baseline (hollow), the roof",
    )
    axes.legend(fontsize=8)
    axes.grid(True, which="both", alpha=0.2)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the roofline of a result file.")
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, help="default: the same name with .png")
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    print("wrote", plot(result, arguments.out or arguments.result.with_suffix(".png")))


if __name__ == "__main__":
    main()
