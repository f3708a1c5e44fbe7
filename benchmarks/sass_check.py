"""Reads the machine code of the CUDA kernels: the instructions that they are made for are there, and nothing spills.

    python benchmarks/sass_check.py qpeft_ext/_C.so --cuobjdump PATH      exit code 1 if something is missing

For each architecture each operator's kernels must have the instructions of `WANTED`: HMMA (tensor cores), LDG.E.128 or,
past the registers, LDGSTS.E...128 (16-byte loads). None may have LDL or STL (local memory: spills, or arrays that are
indexed at run time).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

INSTRUCTIONS = {
    "16-byte loads": re.compile(r"\b(LDG|LDGSTS)\.E\S*\.128"),
    "tensor cores": re.compile(r"\b(HMMA|HGMMA|UTCHMMA)\b"),
}
LOCAL = re.compile(r"\b(LDL|STL)\b")
WANTED = {  # of the kernels of <op>*_kernel.cu together
    "similarity_topk": set(INSTRUCTIONS),
    "clue_attention": set(INSTRUCTIONS),
    "token_log_likelihood": {"16-byte loads"},
}


def kernels(dump: str) -> dict[tuple[str, str], list[str]]:
    """(architecture, mangled name) -> lines of machine code."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    architecture = name = ""
    for line in dump.splitlines():
        if match := re.search(r"\barch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            name = match[1]
        elif name and "/*" in line:
            found[architecture, name].append(line)
    return found


def check(dump: str) -> tuple[list[str], list[str]]:
    """(lines of the report, what is wrong)"""
    code = kernels(dump)
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    count: dict[tuple[str, str], int] = defaultdict(int)
    wrong = [] if code else ["no machine code found"]
    for (architecture, name), lines in code.items():
        text = "\n".join(lines)
        if LOCAL.search(text):
            wrong.append(f"{architecture}: {name} uses local memory")
        for op in WANTED:
            if op in name:  # the file's name is part of an anonymous namespace's
                count[architecture, op] += 1
                found[architecture, op] |= {word for word, pattern in INSTRUCTIONS.items() if pattern.search(text)}
    report = []
    for architecture in sorted({architecture for architecture, _ in code}):
        for op, wanted in WANTED.items():
            has = found[architecture, op]
            words = ", ".join(sorted(has)) or "neither"
            report.append(f"{architecture}: {op}: {count[architecture, op]} kernels, {words}")
            wrong += [f"{architecture}: {op} has no {word}" for word in sorted(wanted - has)]
    return report, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the machine code of the CUDA kernels.")
    parser.add_argument("library", type=Path)
    parser.add_argument("--cuobjdump", default=shutil.which("cuobjdump"), help="default: the one on PATH")
    arguments = parser.parse_args()
    if not arguments.cuobjdump:
        sys.exit("sass_check: cuobjdump is not on PATH; name it with --cuobjdump (the package triton brings one)")
    command = [arguments.cuobjdump, "--dump-sass", str(arguments.library)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"sass_check: {' '.join(command)} failed: {ran.stderr.strip()[-200:]}")
    report, wrong = check(ran.stdout)
    print(*report, *(f"WRONG {line}" for line in wrong), sep="\n")
    print(f"sass_check: {'FAILED' if wrong else 'ok'}, {len(report)} rows, {len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
