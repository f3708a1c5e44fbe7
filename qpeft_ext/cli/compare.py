"""``qpeft compare``: methods × collections × seeds, resumable, with tables and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..utils.console import say
from .common import Device


def command(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.yaml", help="Methods, collections and seeds.")],
    output: Annotated[Path, typer.Option(help="Folder for the results; one that is there is gone on with.")],
    data_root: Annotated[
        Path, typer.Option(envvar="QPEFT_DATA", help="Folder that the plan's data paths are below.")
    ] = Path("."),
    method: Annotated[list[str] | None, typer.Option(help="Only this method of the plan; repeatable.")] = None,
    collection: Annotated[list[str] | None, typer.Option(help="Only this collection of the plan; repeatable.")] = None,
    table_only: Annotated[bool, typer.Option("--table-only", help="Tables and page of what is there.")] = False,
    device: Device = None,
) -> None:
    """Compare methods in one harness: the same candidates, tokens, truncation and LM for all.

    Every result (method, collection, seed) has a folder with its settings, adapter, run file, values per query,
    versions and commit. After a kill the same command goes on; a result is made again only when its settings changed.
    Started several times at once, the processes share the work.
    Writes comparison.md, .csv, .json and .html. Plans: benchmarks/compare/.
    """
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
    except ValueError:  # some results may be there
        if any(output.glob("*/*/*/result.json")):
            _write(asked, output)
        raise
    _write(asked, output)


def _write(plan, output: Path) -> None:
    from ..compare.page import html
    from ..compare.tables import build_tables
    from ..compare.texts import csv_text, json_text, markdown, render
    from ..utils.files import write_text

    tables = build_tables(plan, output)
    for name, content in (
        ("comparison.md", markdown(plan, tables)),
        ("comparison.csv", csv_text(tables)),
        ("comparison.json", json_text(tables)),
        ("comparison.html", html(plan, tables)),
    ):
        write_text(output / name, content, follow=False)
    say(render(tables))
    say(f"wrote comparison.md, .csv, .json and .html to {output}/")
