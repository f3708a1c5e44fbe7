"""Write the tables of README.md from benchmarks/results/*.json, between their markers.

python benchmarks/readme_tables.py          rewrite
python benchmarks/readme_tables.py --check  fail if README.md is not what the results say
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
README = ROOT / "README.md"


def main() -> int:
    text = README.read_text(encoding="utf-8")
    names = re.findall(r"<!-- results: (\S+) -->", text)
    for name in names:
        pattern = re.compile(rf"(<!-- results: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda match, name=name: match[1] + table(name) + match[2], text)
    if "--check" in sys.argv:
        if text != README.read_text(encoding="utf-8"):
            print("README.md does not show the committed results; run python benchmarks/readme_tables.py")
            return 1
        return 0
    README.write_text(text, encoding="utf-8")
    return 0


def table(name: str) -> str:
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
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    machine = result["machine"] if on_gpu else f"{result['machine']}, {result['threads']} threads"
    lines += [
        "",
        f"{machine}, {versions}; `{result['command']}`, {result['date'][:10]}. "
        "Each cell: milliseconds, and how many times ours (below 1, in bold, they are faster).",
    ]
    missing = {baseline: why for row in rows for baseline, why in row.get("not_run", {}).items() if on_gpu}
    if missing:
        lines[-1] += " Not run: " + "; ".join(f"`{baseline}` ({why})" for baseline, why in missing.items()) + "."
    if path.with_suffix(".png").is_file():
        lines += ["", f"![roofline](benchmarks/results/{name}.png)"]
    return "\n".join(lines) + "\n"


def _against(row: dict, baseline: str) -> str:
    time = row["baselines_ms"].get(baseline)
    if time is None:
        return "–"
    ratio = row["ratio"][baseline]
    return f"{_ms(time)} ({ratio:.2f}×)" if ratio >= 1 else f"{_ms(time)} (**{ratio:.2f}×**)"


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


if __name__ == "__main__":
    raise SystemExit(main())
