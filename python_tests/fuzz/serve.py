"""Requests that schemathesis makes of the server's own description, against a running `qpeft serve`.

    python python_tests/fuzz/serve.py --tool build/fuzz-serve/bin/schemathesis --count 10000

Checked: no answer is a server's error; status, content type and body of each are as described. ``make fuzz-serve``
installs schemathesis into an environment of its own and runs this.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import qpeft_ext

DEMO = Path(qpeft_ext.__file__).parent / "demo"
ROUTES = ("/v2/rerank", "/v1/rerank", "/rerank", "/score", "/v1/score", "/v1/models", "/info", "/health", "/metrics")
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def wait_until_ready(address: str, server: subprocess.Popen) -> None:
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/ready", timeout=60):
                return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"the server ended with code {server.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", required=True, help="the program schemathesis")
    parser.add_argument("--count", type=int, default=10_000, help="requests, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phases", default="examples,coverage,fuzzing", help="of schemathesis")
    given = parser.parse_args()
    command = [sys.executable, "-m", "qpeft_ext.cli", "serve", "--model", f"code={DEMO / 'adapter'}",
               "--base-model", str(DEMO / "base_lm"), "--port", "0", "--device", "cpu", "--log-level", "error",
               "--max-documents", "20", "--max-document-tokens", "32"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://127.0.0.1:\d+", server.stdout.readline())
            if found is None:
                raise SystemExit("the server did not start")
            wait_until_ready(found[0], server)
            each = max(1, -(-given.count // 6))  # six of the ten operations take as many as they may
            fuzz = [given.tool, "run", f"{found[0]}/openapi.json", "--checks", CHECKS, "--max-examples", str(each),
                    "--seed", str(given.seed), "--phases", given.phases, "--mode", "all",
                    "--request-timeout", "120", "--no-color",
                    *[word for route in ROUTES for word in ("--include-path", route)]]  # fmt: skip
            return subprocess.run(fuzz).returncode or (1 if server.poll() is not None else 0)
        finally:
            server.terminate()


if __name__ == "__main__":
    sys.exit(main())
