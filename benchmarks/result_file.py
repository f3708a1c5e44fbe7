"""The files in benchmarks/results, and the options that benchmarks share."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch
from timing import Rates

from qpeft_ext.utils.files import write_text

RESULTS = Path(__file__).parent / "results"


def new_parser(description: str, op: str, threads: int | None = None) -> argparse.ArgumentParser:
    """Return a parser with the options that benchmarks share: --device, --threads, --out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=threads or torch.get_num_threads())
    parser.add_argument("--out", type=Path, help=f"default results/<machine>_{op}.json; no file for a tiny work")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line, and use as many threads as it asks for."""
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def save(arguments: argparse.Namespace, op: str, rows: list[dict], rates: Rates | None = None) -> Path:
    """Write rows to ``--out``, or else to the file of this machine and ``op``."""
    path = arguments.out or RESULTS / f"{machine(arguments.device)}_{op}.json"
    return write(path, arguments.device, rows, rates)


def named_after(op: str, base_model: str) -> str:
    """Return the name of a file of results of a pretrained LM."""
    return f"{op}_" + re.sub(r"[^a-z0-9]+", "-", base_model.lower().rpartition(":")[2]).strip("-")


def machine(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU and its threads, as it stands in file names."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_name()}-{vectors()}-{torch.get_num_threads()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").removeprefix("nvidia-")


def cpu_name() -> str:
    """Return the name that the kernel gives the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def vectors() -> str:
    """Return the widest instructions of the processor, since machines whose names are equal differ in them."""
    info = Path("/proc/cpuinfo")
    flags = set(re.findall(r"\w+", info.read_text())) if info.is_file() else set()
    kinds = {"amx_bf16": "AMX", "avx512_vnni": "AVX-512 VNNI", "avx512f": "AVX-512", "avx2": "AVX2"}
    return next((name for flag, name in kinds.items() if flag in flags), platform.machine())


def write(path: Path, device: torch.device, rows: list[dict], machine_rates: Rates | None = None) -> Path:
    """Write rows and the facts about this run; rows of other works that the file has stay."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    earlier = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    if device.type == "cuda":
        rows = [row | {"command": command} for row in rows]  # several scripts write this file
    new = {row["work"] for row in rows}
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True)
    commit = git.stdout.strip()
    content = {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "device": device.type,
        "instructions": vectors() if device.type == "cpu" else None,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit or None,
        "command": command if device.type == "cpu" else "bash benchmarks/gpu_check.sh",
        "date": datetime.date.today().isoformat(),
        "rates": machine_rates._asdict() if machine_rates else earlier.get("rates"),
        "rows": [row for row in earlier["rows"] if row["work"] not in new] + rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path
