"""`qpeft serve` under load: 32 clients, 20 documents a request, each document in 1, 2 or 8 of the waiting requests.

    python benchmarks/bench_serve.py                          # the packaged LM
    python benchmarks/bench_serve.py --adapter A --base-model B --clients 8 --documents 5 --waves 1

Systems, each a server of its own with the same LM, threads and requests; they take turns, wave by wave, so that a busy
machine is busy for all of them, and are stopped while another one has its turn; all compute in float32:
    ours              `qpeft serve` as it is by default
    one_at_a_time     the same with its cache off, and one client
    litserve          LitServe, which batches the requests that wait and reads whole prompts; if it is installed
    ours_warm         the same wave once more, now that the documents are in the cache
    litserve_warm     the same, for LitServe around a reranker that shares documents and has a cache

``bound`` is what sharing can give at most: the tokens that are read without it, divided by those with it. Then the
fairness: requests of 5 documents, first alone, then beside four of 1,000 documents, where their p99 should stay below
``limit_s``, three times that alone and one pass. Scores are compared first.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from result_file import new_parser, parse, save
from serving_load import Request, chunks, free_port, litserve, ours, query_of, send, send_all, server, stopped, waves

import qpeft_ext as qpeft
from qpeft_ext.serving.settings import Limits

DEMO = Path(qpeft.__file__).parent / "demo"
TOLERANCE = 1e-3  # nats of a whole query, float32


class System(NamedTuple):
    """A server: its port, the group of its processes, and whether its clients take turns."""

    port: int
    group: int
    alone: bool


def servers(stack: ExitStack, adapter: str, base_model: str, threads: int) -> dict[str, System]:
    """Start the servers."""
    model = ("--model", f"m={adapter}", "--base-model", base_model)
    commands = {"ours": ours(port := free_port(), model)}
    ports = {"ours": port}
    commands["one_at_a_time"] = ours(port := free_port(), model, "--cache-bytes", "0")
    ports["one_at_a_time"] = port
    if importlib.util.find_spec("litserve") is not None:
        for name, cached in (("litserve", False), ("litserve_warm", True)):
            commands[name] = litserve(port := free_port(), adapter, base_model, cached)
            ports[name] = port
    else:
        print("not run: litserve is not installed")
    systems = {}
    for name, command in commands.items():
        group = stack.enter_context(server(command, ports[name], threads))
        systems[name] = System(ports[name], group, name == "one_at_a_time")
        print(f"{name} is up", flush=True)
    return systems


def others(systems: dict[str, System], name: str) -> list[int]:
    """Return the groups of all systems but one."""
    return [system.group for other, system in systems.items() if other != name]


def bound(requests: list[Request], reranker: qpeft.Reranker) -> float:
    """Return the tokens that are read without sharing, divided by those with it."""
    prompt = reranker.model.prompt
    suffix = sum(
        (len(prompt.queries([r.query], [])[0]) + prompt.suffix.least_tokens - 1) * len(r.documents) for r in requests
    )
    lengths = {text: len(prompt.documents([text])[0].ids) for r in requests for text in r.documents}
    read = sum(lengths[text] for r in requests for text in r.documents)
    return (read + suffix) / (sum(lengths.values()) + suffix)


def throughput(systems: dict[str, System], requests: list[list[Request]], clients: int) -> dict[str, dict]:
    """Let the systems take turns over the waves; returns seconds and latencies of each."""
    times: dict[str, list[float]] = {}
    latencies: dict[str, list[float]] = {}

    def measure(name: str, port: int, wave: list[Request], count: int) -> list[dict[int, float]]:
        seconds, each, scores = send_all(port, wave, count)
        times.setdefault(name, []).append(seconds)
        latencies.setdefault(name, []).extend(each)
        return scores

    for place, wave in enumerate(requests):
        expected = None
        order = list(systems.items())
        for name, (port, _, alone) in order[place % len(order) :] + order[: place % len(order)]:
            with stopped(others(systems, name)):
                if name == "litserve_warm":
                    send_all(port, wave, clients)  # its cache is filled
                scores = measure(name, port, wave, 1 if alone else clients)
                if name == "ours":
                    measure("ours_warm", port, wave, clients)
            expected = expected or scores
            worst = max(abs(e[i] - s[i]) for e, s in zip(expected, scores, strict=True) for i in e)
            if worst > TOLERANCE:
                raise SystemExit(f"{name} gives other scores: {worst:.1e} nats apart")
    return {
        name: {
            "seconds": sum(seconds),
            "pairs_per_s": sum(len(r.documents) for wave in requests for r in wave) / sum(seconds),
            "p50_s": float(np.percentile(latencies[name], 50)),
            "p99_s": float(np.percentile(latencies[name], 99)),
            "wave_seconds": seconds,
        }
        for name, seconds in times.items()
    }


def fairness(port: int, documents: int, count: int) -> dict[str, float]:
    """Time requests of 5 documents alone, then beside four of many documents."""
    texts = chunks(4 * documents + 10 * count, characters=400)
    short = [Request(query_of(texts[5 * i], 9, i), texts[5 * i : 5 * i + 5]) for i in range(2 * count)]
    start = 10 * count
    long = [
        Request(query_of(texts[start + i], 8, i), texts[start + i * documents : start + (i + 1) * documents])
        for i in range(4)
    ]
    alone = [send(port, request)[0] for request in short[:count]]
    answers: list[tuple[float, list[float], list[dict[int, float]]]] = []
    thread = threading.Thread(target=lambda: answers.append(send_all(port, long, len(long))))
    started = time.perf_counter()
    thread.start()
    time.sleep(1.0)
    beside = []
    for request in short[count:]:
        if not thread.is_alive():
            break
        beside.append(send(port, request)[0])
    thread.join()
    if not answers:
        raise RuntimeError("the long requests were not answered")
    return {
        "alone_p50_s": float(np.percentile(alone, 50)),
        "alone_p99_s": float(np.percentile(alone, 99)),
        "beside_p50_s": float(np.percentile(beside, 50)),
        "beside_p99_s": float(np.percentile(beside, 99)),
        "beside_requests": len(beside),
        "limit_s": 3 * float(np.percentile(alone, 99)) + Limits().pass_seconds,
        "long_seconds": time.perf_counter() - started,
    }


def main() -> int:
    parser = new_parser(__doc__ or "", "serve", threads=2)
    parser.add_argument("--adapter", default=str(DEMO / "adapter"))
    parser.add_argument("--base-model", default=str(DEMO / "base_lm"))
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--waves", type=int, default=3)
    parser.add_argument("--sharing", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--long-documents", type=int, default=1000, help="of a long request; 0: no fairness")
    given = parse(parser)
    lm = Path(given.base_model).name.removeprefix("package:")
    reranker = qpeft.Reranker.from_pretrained(given.adapter, given.base_model, device="cpu")
    rows = []
    with ExitStack() as stack:
        systems = servers(stack, given.adapter, given.base_model, given.threads)
        for seed, sharing in enumerate(given.sharing):
            work = waves(given.clients, given.documents, sharing, given.waves, seed)
            row = {"work": f"serve/{lm}/{given.clients}x{given.documents}/shared {sharing}",
                   "bound": bound(work[0], reranker), "systems": throughput(systems, work, given.clients)}  # fmt: skip
            seconds = {name: measured["seconds"] for name, measured in row["systems"].items()}
            row["ratio"] = {name: value / seconds["ours"] for name, value in seconds.items() if name != "ours"}
            if "litserve_warm" in seconds:
                row["warm_ratio"] = seconds["litserve_warm"] / seconds["ours_warm"]
            show(row)
            rows.append(row)
        if given.long_documents:
            with stopped(others(systems, "ours")):
                row = {"work": f"serve/{lm}/fairness", **fairness(systems["ours"].port, given.long_documents, 30)}
            print(row, flush=True)
            rows.append(row)
    print("wrote", save(given, "serve", rows))
    return 0


def show(row: dict) -> None:
    print(f"{row['work']}: bound {row['bound']:.2f}")
    for name, measured in row["systems"].items():
        times = f"{row['ratio'][name]:5.2f} × the time of ours" if name in row["ratio"] else ""
        print(f"    {name:14} {measured['pairs_per_s']:8.1f} pairs/s, p50 {measured['p50_s']:6.2f} s, "
              f"p99 {measured['p99_s']:6.2f} s {times}")  # fmt: skip
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
