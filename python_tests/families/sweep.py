"""All causal and encoder–decoder model types of the installed transformers, as tiny random LMs: are our scores theirs?

Each type in a process of its own, with a limit of time and memory. The oracle is the LM's own forward from ids, one
unpadded prompt at a time. Results are kept, one file a type, so that the sweep can be stopped and taken up again.

    python python_tests/families/sweep.py [--types llama bart …] [--out build/sweep] [--table docs/families.md]

`make sweep` does all of them (some minutes) and writes docs/families.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path

import peft
import tiny
import torch
import transformers
from shrink import small_config
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

import qpeft_ext as qpeft

TOLERANCE = 2e-5
SECONDS, BYTES = 240, 12 << 30
LARGEST = 40_000_000  # parameters; larger ones were not shrunk
QUERIES = ["why tides?", "boats"]
DOCUMENTS = ["tides rise", {"title": "Moon", "text": "pulls the sea twice a day"}, "", "a passage about harbours"]
PAIRS = [(query, document) for query in QUERIES for document in DOCUMENTS][:7]


def all_types() -> list[tuple[str, str]]:
    return [(name, "causal") for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)] + [
        (name, "encoder–decoder") for name in sorted(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)]  # fmt: skip


def build(name: str, kind: str) -> torch.nn.Module:
    config = small_config(name)
    if kind == "causal" and getattr(config, "is_encoder_decoder", False):
        config.is_encoder_decoder, config.is_decoder = False, True
    if kind == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    if kind != "causal" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    auto = transformers.AutoModelForCausalLM if kind == "causal" else transformers.AutoModelForSeq2SeqLM
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"not shrunk: {size:,} parameters")
    torch.manual_seed(0)
    lm = auto.from_config(config, dtype=torch.float32)
    tiny.draw_weights(lm)
    with torch.no_grad():
        for parameter in lm.parameters():  # what is zero at the start decides nothing yet
            if parameter.dim() == 1 and not parameter.any():
                parameter.normal_(0, 0.25)
    return lm.eval()


@torch.no_grad()
def own_scores(model: qpeft.QPeftModel) -> torch.Tensor:
    if not model.engine.is_encoder_decoder:
        return tiny.own_scores(model, PAIRS)
    scores = []
    for query, document in PAIRS:
        batch = model.encode([(query, document)])
        target = model.prompt.suffix.scored(batch.queries[0])
        given = (model.engine.start, *model.prompt.suffix.given, *target[:-1])
        read, _, _ = model.prompt.suffix.lay_out(batch.documents[0].ids, 0)
        log_p = model.lm(input_ids=torch.tensor([read]), decoder_input_ids=torch.tensor([given]),
                         use_cache=False).logits[0].float().log_softmax(-1)  # fmt: skip
        scores.append(sum(log_p[len(given) - len(target) + i, token] for i, token in enumerate(target)))
    return torch.stack(scores)


def sweep_one(name: str, kind: str) -> dict:
    """Returns: {"path", "error", "note"} and more."""

    def failed(path: str, error: Exception) -> dict:
        return {"path": path, "note": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}

    try:
        lm = build(name, kind)
    except Exception as error:  # noqa: BLE001
        return failed("not built", error)
    with torch.no_grad():
        try:
            given = {"decoder_input_ids": torch.tensor([[5, 6]])} if kind != "causal" else {}
            lm(input_ids=torch.tensor([[5, 6, 7]]), **given)
        except Exception as error:  # noqa: BLE001
            return failed("own forward fails", error)
    try:
        model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none"), tiny.tiny_tokenizer())
    except ValueError as error:
        return {"path": "refused", "note": " ".join(str(error).split())[:250]}
    try:
        expected, again = own_scores(model), own_scores(model)
    except Exception as error:  # noqa: BLE001
        return failed("own forward fails", error)
    cache, reranker = qpeft.DocumentCache(), qpeft.Reranker
    ways = {
        "alone": lambda: [reranker(model).predict(pair) for pair in PAIRS],
        "together": lambda: reranker(model).predict(PAIRS),
        "cold": lambda: reranker(model, cache=cache).predict(PAIRS),
        "warm": lambda: reranker(model, cache=cache).predict(PAIRS),
        "plain": lambda: reranker(model, path="plain").predict(PAIRS),
    }
    errors = {way: float((torch.as_tensor(score()).float() - expected).abs().max()) for way, score in ways.items()}
    engine = model.engine
    path = "unpadded" if engine.why_unpadded else "plain" if engine.why_not_cached else "shared"
    if engine.is_encoder_decoder:
        path = "unpadded" if engine.why_unpadded else "encoder–decoder"
    note = engine.why_unpadded or (engine.why_not_cached if not engine.is_encoder_decoder else "")
    return {
        "path": path,
        "note": note,
        "errors": errors,
        "error": max(errors.values()),
        "largest": float(expected.abs().max()),
        "spread": float(expected.std()),
        "repeats": float((again - expected).abs().max()),
        "head": engine.head.reason,
    }


def in_a_process(name: str, kind: str) -> dict:
    def run(pipe) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        try:
            pipe.send(sweep_one(name, kind))
        except BaseException as error:  # noqa: BLE001
            import traceback

            where = traceback.extract_tb(error.__traceback__)[-1]
            pipe.send(
                {
                    "path": "FAILED",
                    "note": f"{type(error).__name__}: {' '.join(str(error).split())[:200]} "
                    f"({Path(where.filename).name}:{where.lineno})",
                }
            )
        pipe.close()

    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=run, args=(theirs,))
    process.start()
    theirs.close()
    try:
        result = ours.recv() if ours.poll(SECONDS) else {"path": "not built", "note": f"longer than {SECONDS} s"}
    except EOFError:
        result = {"path": "FAILED", "note": "the process died"}
    process.kill()
    process.join()
    return result


_ORDER = {"DIFFERENT": 0, "FAILED": 1, "shared": 2, "encoder–decoder": 3, "plain": 4, "unpadded": 5, "refused": 6,
          "own forward fails": 7, "not built": 8}  # fmt: skip
_HEAD = """# Model types of transformers

`make sweep` made this page: {versions}, {date}, float32 on a CPU. A tiny random LM of each type that
`AutoModelForCausalLM` and `AutoModelForSeq2SeqLM` list scores {pairs} pairs with `Reranker.predict`: one at a time, all
together, with a cold and a warm `DocumentCache`, and on the plain path. The error is the largest difference from the
LM's own forward from token ids, one unpadded prompt at a time, in nats ({tolerance:g}, or one unit in the last place of
the score, is taken for equal).

* **shared**: a document is read once for all its queries. **encoder–decoder**: the same, where no clues follow it.
* **plain**: whole prompts are read, several in a pass. **unpadded**: whole prompts, each in a pass of its own.
* **refused**: `get_qpeft_model` raises a `ValueError` with the line that is shown.
* **own forward fails**: the tiny LM cannot be run by transformers itself as it is (a language must be set, a second
  model given). **not built**: transformers cannot make a tiny LM of the type here; this says nothing about larger ones.

What was looked into:

* **Doge, DeepSeek-V3.2, GLM-MoE-DSA, Hy-V4, AXK2** choose some keys for each query where there are more than
  `keep_window_size` or `index_topk`. How they choose among equal values (two equal tokens in the first layer, scores of
  zero) depends on all that is read, so their own forward gives the same tokens other numbers in a longer prompt. Up to
  that length they are right, and a longer prompt is refused. In tiny LMs a limit of 8 moves scores by 0.2 to 2 nats.
* **Dory** runs layers several times with a cache for each time, and stores its last layer before others: plain path.
* **Moshi**'s cache drops keys beyond its window, its masks do not: plain path.
* **RoBERTa and its kin** count positions from the padding id on where they read ids: refused.
* **Gemma 3n, DeepSeek-V4, Gemma 4 with embeddings per layer** (E2B, E4B; the larger ones have none) read token ids in
  their layers too, which clues do not have: refused.
* **XLM, ProphetNet** as causal LMs give a token other logits where other, or more, tokens follow it: refused.
* LMs with recurrent state (Mamba, Jamba, Bamba, …) keep no keys that could be shared: plain path.

{counts}

| model type | kind | path | largest error | note |
|---|---|---|---|---|
"""


def table(folder: Path) -> str:
    results = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    for result in results:
        if "error" in result and not result["error"] <= max(TOLERANCE, 2e-7 * result.get("largest", 0)):
            result["note"], result["path"] = f"{result['path']}; {result['note']}", "DIFFERENT"
    results.sort(key=lambda result: (_ORDER[result["path"]], result["kind"], result["type"]))
    counts = {path: sum(result["path"] == path for result in results) for path in _ORDER}
    said = ", ".join(f"{count} {path}" for path, count in counts.items() if count)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, peft {peft.__version__}"
    head = _HEAD.format(
        versions=versions,
        date=time.strftime("%Y-%m-%d"),
        pairs=len(PAIRS),
        tolerance=TOLERANCE,
        counts=f"{len(results)} types: {said}.",
    )
    lines = [f"| {r['type']} | {r['kind']} | {r['path']} | {format(r['error'], '.1e') if 'error' in r else ''} | "
             f"{r['note'].replace('|', '/')[:160]} |" for r in results]  # fmt: skip
    return head + "\n".join(lines) + "\n"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--types", nargs="*")
    arguments.add_argument("--out", type=Path, default=Path("build/sweep"))
    arguments.add_argument("--again", action="store_true", help="also those that have a result")
    arguments.add_argument("--table", type=Path, help="write the page of all results there")
    given = arguments.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    sweep_one("llama", "causal")  # what all of them import is there in each process then
    for name, kind in all_types():
        path = given.out / f"{name}.{'causal' if kind == 'causal' else 'seq2seq'}.json"
        if given.types and name not in given.types or path.exists() and not given.again:
            continue
        start = time.time()
        result = {"type": name, "kind": kind} | in_a_process(name, kind)
        path.write_text(json.dumps(result, ensure_ascii=False, indent=1))
        print(f"{name:28s} {result['path']:18s} {result.get('error', float('nan')):8.1e} {time.time() - start:5.1f}s "
              f"{result['note'][:150]}", flush=True)  # fmt: skip
    if given.table:
        given.table.write_text(table(given.out), encoding="utf-8")


if __name__ == "__main__":
    main()
