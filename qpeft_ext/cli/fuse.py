"""``qpeft fuse``: make one run of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import RUN_OUTPUT

K, NORMALIZATION, MEASURE = 60, "min_max", "nDCG@10"


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="TREC runs, two or more.")],
    output: Annotated[Path, typer.Option(help=RUN_OUTPUT)],
    method: Annotated[str, typer.Option(help="rrf (reciprocal ranks) or scores (weighted sums of scores).")] = "rrf",
    k: Annotated[int, typer.Option(help="Constant of rrf, which sums 1 / (k + rank).")] = K,
    weights: Annotated[str | None, typer.Option(help="Weights for scores, one per run, such as 0.3,0.7.")] = None,
    normalization: Annotated[
        str, typer.Option(help="Scaling of scores per query: min_max or z_score.")
    ] = NORMALIZATION,
    dev_run: Annotated[
        list[Path] | None, typer.Option(help="Run to choose the weights on; give one for each RUN, in the same order.")
    ] = None,
    dev_qrels: Annotated[str | None, typer.Option(help="Qrels of the dev queries.")] = None,
    measure: Annotated[str, typer.Option(help="Measure that the weights are chosen by.")] = MEASURE,
) -> None:
    """Fuse runs by reciprocal ranks or by weighted scores.

    Weights are given, or chosen on the queries of dev runs. The dev queries must differ from the fused ones:
    weights chosen on the test queries would make the result invalid.

    Example: qpeft fuse bm25.trec mine.trec --method scores --dev-run bm25-dev.trec --dev-run mine-dev.trec
    --dev-qrels dev.tsv --output fused.trec
    """
    from .. import formats
    from ..evaluation.fusion import choose_weights, fuse, reciprocal_rank_fusion
    from ..utils.console import say
    from ..utils.files import expect_no_input
    from ..utils.words import counted

    if method not in ("rrf", "scores"):
        raise ValueError(f"--method must be rrf or scores, got {method!r}")
    if len(runs) < 2:
        raise ValueError(f"expected at least two runs, got {len(runs)}")
    expect_no_input(output, *runs, *(dev_run or ()), dev_qrels)
    chosen = _numbers(weights, len(runs))
    _check_used(method, k, weights, normalization, dev_run, dev_qrels, measure)
    if method == "rrf":
        fused = reciprocal_rank_fusion([formats.read_run(run) for run in runs], k)
        how = f"reciprocal ranks, k {k}"
    else:
        read, how = [formats.read_run(run) for run in runs] if chosen else [], "weights as given"
        if chosen is None:
            if not (dev_run and dev_qrels):
                raise ValueError("--method scores needs --weights, or --dev-run for each run and --dev-qrels")
            if len(dev_run) != len(runs):
                raise ValueError(
                    f"expected {len(runs)} --dev-run, in the order of the runs, got {len(dev_run)}; "
                    "write --dev-run before each"
                )
            read, qrels = [formats.read_run(run) for run in runs], formats.read_qrels(dev_qrels)
            for query_id in qrels:
                if any(query_id in run for run in read):
                    raise ValueError(
                        f"query {query_id!r} is among the dev queries and among those to fuse; "
                        f"choose weights on other queries"
                    )
            chosen, value = choose_weights([formats.read_run(run) for run in dev_run], qrels, measure, normalization)
            how = (
                f"weights {', '.join(f'{weight:g}' for weight in chosen)} chosen on "
                f"{counted(len(qrels), 'dev queries')} ({measure} {value:.4f} there)"
            )
        fused = fuse(read, chosen, normalization)
    lines = formats.write_run(output, fused)
    say(f"{how}; wrote {counted(lines, 'lines')} for {counted(len(fused), 'queries')} to {output}")


def _check_used(
    method: str,
    k: int,
    weights: str | None,
    normalization: str,
    dev_run: list[Path] | None,
    dev_qrels: str | None,
    measure: str,
) -> None:
    """Raises: ValueError for an option that has no effect beside the others."""
    of_choice = {"--dev-run": dev_run, "--dev-qrels": dev_qrels, "--measure": measure != MEASURE}
    of_scores = {"--weights": weights, "--normalization": normalization != NORMALIZATION} | of_choice
    if method == "scores" and k != K:
        raise ValueError("--k belongs to --method rrf")
    for option, given in of_scores.items() if method == "rrf" else ():
        if given:
            raise ValueError(f"{option} belongs to --method scores")
    for option, given in of_choice.items() if weights else ():
        if given:
            raise ValueError(f"{option} is for choosing weights, and --weights gives them; leave one of them out")


def _numbers(weights: str | None, count: int) -> list[float] | None:
    if weights is None:
        return None
    try:
        numbers = [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise ValueError(f"--weights: expected numbers with commas between them, got {weights!r}") from None
    if len(numbers) != count:
        raise ValueError(
            f"--weights: expected {count} numbers with commas between them, one for each run, got {len(numbers)}"
        )
    return numbers
