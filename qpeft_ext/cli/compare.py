"""``qpeft compare``: methods × collections × seeds, resumable, with tables and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..utils.console import say
from ..utils.optional import expect_packages
from .common import Device


def command(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.yaml", help="File with methods, data sets and seeds.")],
    output: Annotated[Path, typer.Option(help="Folder for the results; results in it are kept and completed.")],
    data_root: Annotated[
        Path, typer.Option(envvar="QPEFT_DATA", help="Folder that paths of data in the plan are relative to.")
    ] = Path("."),
    method: Annotated[list[str] | None, typer.Option(help="Only this method; may be repeated.")] = None,
    collection: Annotated[list[str] | None, typer.Option(help="Only this data set; may be repeated.")] = None,
    table_only: Annotated[
        bool,
        typer.Option("--table-only", help="Only write tables of the results so far; LM and data are not looked at."),
    ] = False,
    device: Device = None,
) -> None:
    """Compare methods under the same conditions.

    All methods get the same candidates, tokens, truncation and LM. Every result (method, data set, seed) gets a
    folder with its settings, adapter, run, values per query, versions and commit. After an interruption the same
    command resumes; a result is made again only if its settings have changed. Several processes with the same
    command share the work. Plans are in benchmarks/compare/.

    The command writes comparison.md, .csv, .json and .html.
    """
    expect_packages("qpeft compare", {"ir_measures": "eval", "scipy": "eval", "matplotlib": "plot"})
    from ..compare.plan_file import read_plan

    asked = read_plan(plan, method or (), collection or ())
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; expected a folder for the results")
    if table_only:
        _write(asked, output)
        return
    from ..compare.run import Comparison
    from ..lm.loading import default_device, quiet_transformers

    device = default_device(device)
    quiet_transformers()
    output.mkdir(parents=True, exist_ok=True)
    try:
        Comparison(asked, data_root, output, device).run()
    except ValueError:  # other results may be complete
        if any(output.glob("*/*/*/result.json")):
            _write(asked, output)
        raise
    _write(asked, output)


def _write(plan, output: Path) -> None:
    from ..compare.page import html
    from ..compare.plan import TABLES
    from ..compare.tables import build_tables
    from ..compare.texts import csv_text, json_text, markdown, render
    from ..utils.files import write_text

    tables = build_tables(plan, output)
    contents = (markdown(plan, tables), csv_text(tables), json_text(tables), html(plan, tables))
    for name, content in zip(TABLES, contents, strict=True):
        write_text(output / name, content, follow=False)
    say(render(tables))
    say(f"wrote comparison.md, .csv, .json and .html to {output}/")
