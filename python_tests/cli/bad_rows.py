"""Rows of test_bad_input: how a job is damaged, the command that meets the damage, and what its error must say."""

import gzip
import json
import os
import shutil

import torch
from safetensors.torch import load_file, save_file

RERANK = "rerank --model {job}/adapter --data {job}/data --run {job}/data/run.trec --output {out}"
BM25 = "rerank --model {job}/adapter --data {job}/data --output {out}"
UPR = "rerank --base-model {job}/lm --upr --data {job}/data --run {job}/data/run.trec --output {out}"
EVALUATE = "evaluate --qrels {job}/data/qrels/test.tsv {job}/data/run.trec --output {out}"
TRAIN = "train --base-model {job}/lm --data {job}/data --output {out}"
TRAIN_FILE = "train --base-model {job}/lm --train {job}/train.jsonl --output {out}"
CORPUS, QUERIES, RUN = "data/corpus.jsonl", "data/queries.jsonl", "data/run.trec"
TEST, TRAINING = "data/qrels/test.tsv", "data/qrels/train.tsv"


# Damage: functions of the job's folder ------------------------------------------------------------------------------


def nothing(job):
    """The fault is in the command."""


def without(name):
    def damage(job):
        shutil.rmtree(job / name) if (job / name).is_dir() else (job / name).unlink()

    return damage


def content(name, data):
    def damage(job):
        (job / name).parent.mkdir(parents=True, exist_ok=True)
        (job / name).write_bytes(data)

    return damage


def line(name, number, text):
    """Put ``text`` in the place of line ``number`` (from 1)."""

    def damage(job):
        lines = (job / name).read_bytes().split(b"\n")
        lines[number - 1] = text if isinstance(text, bytes) else text.encode()
        (job / name).write_bytes(b"\n".join(lines))

    return damage


def cut_gz(name):
    """Compress, then lose the second half."""

    def damage(job):
        data = gzip.compress((job / name).read_bytes())
        (job / f"{name}.gz").write_bytes(data[: len(data) // 2])
        (job / name).unlink()

    return damage


def weights(change):
    def damage(job):
        path = job / "adapter" / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return damage


def config(**values):
    def damage(job):
        path = job / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def lm_of(**values):
    """Other facts about the LM in the adapter's config."""

    def damage(job):
        path = job / "adapter" / "adapter_config.json"
        then = json.loads(path.read_text())
        path.write_text(json.dumps(then | {"base_model": then["base_model"] | values}))

    return damage


def pipe(name):
    """A named pipe that nobody writes to, in the place of a file."""

    def damage(job):
        (job / name).unlink()
        os.mkfifo(job / name)

    return damage


def broken_lm(job):
    path = job / "lm" / "model.safetensors"
    state = load_file(path)
    state["model.norm.weight"] = torch.full_like(state["model.norm.weight"], float("nan"))
    save_file(state, path, metadata={"format": "pt"})


def half_file(name):
    def damage(job):
        data = (job / name).read_bytes()
        (job / name).write_bytes(data[: len(data) // 2])

    return damage


def example(**values):
    return content("train.jsonl", json.dumps({"query": "q", "positives": ["p"], "negatives": ["n"]} | values).encode())


ROWS = {
    # missing, empty, truncated, undecodable files
    "no data folder": (without("data"), RERANK, ["data: no such file or folder", "corpus.jsonl (BEIR)"]),
    "no corpus": (without(CORPUS), RERANK, ["no BEIR folder with corpus.jsonl", "corpus.jsonl.gz"]),
    "no queries": (without(QUERIES), RERANK, ["no BEIR folder with queries.jsonl"]),
    "no run": (without(RUN), RERANK, ["run.trec: no such file", "TREC run"]),
    "no such split": (nothing, RERANK + " --split dev", ["has no split 'dev'; there are: test, train"]),
    "no training qrels": (without(TRAINING), TRAIN, ["has no split 'train'; there are: test"]),
    "no examples file": (nothing, TRAIN_FILE, ["train.jsonl: no such file"]),
    "empty corpus": (content(CORPUS, b""), RERANK, ["corpus.jsonl: the corpus is empty", '"_id", "title", "text"']),
    "empty queries": (content(QUERIES, b"\n\n"), RERANK, ["queries.jsonl: no queries"]),
    "empty run": (content(RUN, b""), RERANK, ["run.trec: the run is empty", "query_id Q0 doc_id rank score tag"]),
    "empty qrels": (content(TEST, b""), EVALUATE, ["test.tsv: the qrels are empty"]),
    "qrels of a header": (content(TEST, b"query-id\tcorpus-id\tscore\n"), RERANK, ["test.tsv: the qrels are empty"]),
    "empty examples": (content("train.jsonl", b""), TRAIN_FILE, ["train.jsonl: no training examples"]),
    "truncated corpus": (
        cut_gz(CORPUS),
        RERANK,
        ["corpus.jsonl.gz: not a whole gzip file", "copy or compress it again"],
    ),
    "truncated queries": (cut_gz(QUERIES), RERANK, ["queries.jsonl.gz: not a whole gzip file"]),
    "truncated run": (cut_gz(RUN), RERANK + ".gz --run {job}/data/run.trec.gz", ["run.trec.gz: not a whole gzip file"]),
    "gz by name only": (
        content("data/x.gz", b"q1 Q0 d1 1 1.0 t"),
        RERANK + " --run {job}/data/x.gz",
        ["x.gz: not a whole gzip file", "Not a gzipped file"],
    ),
    "undecodable corpus": (
        line(CORPUS, 3, b'{"_id": "d3", "text": "caf\xe9"}'),
        RERANK,
        ["corpus.jsonl, line 3: expected UTF-8, got the byte 0xe9 at position 26"],
    ),
    "undecodable run": (line(RUN, 2, b"q1 Q0 d\xff 1 1.0 t"), RERANK, ["run.trec, line 2: expected UTF-8", "0xff"]),
    "UTF-16 queries": (
        content(QUERIES, '{"_id": "q1", "text": "x"}'.encode("utf-16")),
        RERANK,
        ["queries.jsonl, line 1: expected UTF-8", "0xff"],
    ),
    "run is a folder": (nothing, RERANK + " --run {job}/data", ["data is a folder", "expected a TREC run"]),
    # pipes: reading them would never end
    "corpus is a pipe": (pipe(CORPUS), RERANK, ["corpus.jsonl is a pipe or a device"]),
    "queries are a pipe": (pipe(QUERIES), RERANK, ["queries.jsonl is a pipe or a device"]),
    "run is a pipe": (pipe(RUN), RERANK, ["run.trec is a pipe or a device"]),
    "qrels are a pipe": (pipe(TEST), RERANK, ["test.tsv is a pipe or a device"]),
    "qrels file is a pipe": (pipe(TEST), EVALUATE, ["test.tsv", "a pipe"]),
    "run is a device": (nothing, RERANK + " --run /dev/zero", ["/dev/zero is a pipe or a device"]),
    "adapter config is a pipe": (pipe("adapter/adapter_config.json"), RERANK, ["it has no adapter_config.json"]),
    "adapter weights are a pipe": (pipe("adapter/adapter_model.safetensors"), RERANK, ["adapter_model.safetensors"]),
    "LM weights are a pipe": (pipe("lm/model.safetensors"), UPR, ["model.safetensors is not a regular file"]),
    "tokenizer is a pipe": (pipe("lm/tokenizer.json"), UPR, ["tokenizer.json is not a regular file"]),
    # wrong contents
    "not JSON": (
        line(CORPUS, 2, '{"_id": "d2", '),
        RERANK,
        ['corpus.jsonl, line 2: expected one JSON object, got \'{"_id": "d2",\''],
    ),
    "not an object": (
        line(CORPUS, 2, '["d2", "text"]'),
        RERANK,
        ["line 2: expected a JSON object, got ['d2', 'text']"],
    ),
    "no text": (line(CORPUS, 4, '{"_id": "d4", "body": "x"}'), RERANK, ["line 4: expected the key 'text'", "'body'"]),
    "text is a number": (line(CORPUS, 4, '{"_id": "d4", "text": 4}'), RERANK, ["line 4: expected text", "got 4"]),
    "half a surrogate pair": (
        line(CORPUS, 4, r'{"_id": "d4", "text": "\ud83d"}'),
        RERANK,
        ["line 4: half a surrogate"],
    ),
    "run with 5 columns": (line(RUN, 4, "q2 Q0 d3 1 3.0"), RERANK, ["run.trec, line 4: expected 6 columns", "got 5"]),
    "qrels with 2 columns": (line(TEST, 3, "q1\td4"), RERANK, ["test.tsv, line 3: expected 3 columns", "'q1\\td4'"]),
    "qrels in two shapes": (line(TEST, 1, "q1\t0\td2\t1"), RERANK, ["test.tsv, line 2: expected 4 columns", "got 3"]),
    "half a judgement": (line(TEST, 2, "q1\td1\t0.5"), RERANK, ["test.tsv, line 2: expected a whole number", "'0.5'"]),
    "score NaN": (line(RUN, 4, "q2 Q0 d3 1 nan t"), RERANK, ["line 4: expected a finite number as score, got 'nan'"]),
    "score too large": (line(RUN, 4, "q2 Q0 d3 1 1e39 t"), RERANK, ["line 4: expected a finite number", "'1e39'"]),
    "rank is a word": (
        line(RUN, 4, "q2 Q0 d3 first 1.0 t"),
        RERANK,
        ["line 4: expected a whole number as rank", "'first'"],
    ),
    "no positives": (example(positives=[]), TRAIN_FILE, ["train.jsonl, line 1: 'positives' is empty"]),
    "positives are text": (example(positives="p"), TRAIN_FILE, ["line 1: expected a list of documents", "got 'p'"]),
    "negative is a number": (example(negatives=[3]), TRAIN_FILE, ["line 1: expected a text or an object", "got 3"]),
    # ids
    "duplicate document": (
        line(CORPUS, 5, '{"_id": "d1", "text": "x"}'),
        RERANK,
        ["corpus.jsonl, line 5: the document id 'd1' was already on line 1"],
    ),
    "duplicate query": (
        line(QUERIES, 2, '{"_id": "q1", "text": "x"}'),
        RERANK,
        ["line 2: the query id 'q1' occurs twice"],
    ),
    "judged twice": (line(TEST, 3, "q1\td1\t0"), RERANK, ["test.tsv, line 3: document 'd1' is judged twice"]),
    "candidate twice": (
        line(RUN, 2, "q1 Q0 d4 2 2.0 t"),
        RERANK,
        ["line 2: document 'd4' occurs twice for query 'q1'"],
    ),
    "unknown query": (line(RUN, 6, "q9 Q0 d1 1 1.0 t"), RERANK, ["run.trec, line 6: query 'q9' is not in the queries"]),
    "unknown document": (line(RUN, 6, "q2 Q0 d9 3 1.0 t"), RERANK, ["run.trec, line 6: document 'd9' of query 'q2'"]),
    "unknown document in training": (
        line(RUN, 6, "q2 Q0 d9 3 1.0 t"),
        TRAIN + " --run {job}/data/run.trec",
        ["document 'd9' of query 'q2' is in the run but not in the corpus"],
    ),
    "qrels of other queries": (
        content(TEST, b"query-id\tcorpus-id\tscore\nz\td1\t1\n"),
        EVALUATE,
        ["no query of the run is in the qrels", "'q1'", "'z'"],
    ),
    # queries
    "empty query": (line(QUERIES, 2, '{"_id": "q2", "text": " "}'), RERANK, ["queries.jsonl, line 2: 'text' is empty"]),
    "query too long": (
        line(QUERIES, 2, json.dumps({"_id": "q2", "text": "tide " * 40})),
        RERANK,
        ["query 'q2'", "has 200 tokens, max_query_tokens is 64", "shorten the query"],
    ),
    # adapters and LMs
    "no adapter": (without("adapter"), RERANK, ["adapter"]),
    "no adapter weights": (without("adapter/adapter_model.safetensors"), RERANK, ["has no adapter_model.safetensors"]),
    "adapter cut short": (half_file("adapter/adapter_model.safetensors"), RERANK, ["not a readable safetensors file"]),
    "adapter config cut short": (half_file("adapter/adapter_config.json"), RERANK, ["adapter_config.json", "JSON"]),
    "adapter of PEFT": (config(peft_type="LORA"), RERANK, ["adapter_config.json", "'LORA'"]),
    "adapter option unknown": (config(num_head=2), RERANK, ["unknown option 'num_head'", "did you mean 'num_heads'"]),
    "adapter option impossible": (config(k=0), RERANK, ["adapter_config.json", "k must be at least 1, got 0"]),
    "adapter option of another type": (config(instruction=5), RERANK, ["instruction must be a text, got 5"]),
    "adapter option huge": (config(k=10**30), RERANK, ["k must be at most 2147483647, got 1000"]),
    "adapter config deep": (content("adapter/adapter_config.json", b"[" * 100_000), RERANK, ["nested deeper than 100"]),
    "adapter config with NaN": (config(margin=float("nan")), RERANK, ["NaN is not a number of JSON"]),
    "adapter with another seed": (config(seed=-1), RERANK, ["seed must be at least 0, got -1"]),
    "adapter with a seed in words": (config(seed="0"), RERANK, ["seed must be a whole number, got '0'"]),
    "probe of words": (lm_of(embedding_probe=["x"] * 16), RERANK, ["embedding_probe", "list of finite numbers"]),
    "probe of another length": (lm_of(embedding_probe=[0.0]), RERANK, ["must have 16 numbers, got 1"]),
    "probe of lists": (lm_of(embedding_probe=[[0.0]] * 16), RERANK, ["embedding_probe", "list of finite numbers"]),
    "base LM of another type": (lm_of(vocab_size="x"), RERANK, ["vocab_size of base_model must be a whole number"]),
    "base LM is a text": (config(base_model="x" * 10_000), RERANK, ["base_model must describe an LM, got 'xxx"]),
    "adapter of another model": (
        nothing,
        RERANK + " --base-model {job}/other_lm",
        ["trained on an LM with other weights"],
    ),
    "adapter keys missing": (weights(lambda state: dict(list(state.items())[1:])), RERANK, ["missing keys: "]),
    "adapter of other shape": (weights(lambda s: {k: torch.zeros(3, 5) for k in s}), RERANK, ["shape", "got [3, 5]"]),
    "NaN in the adapter": (weights(lambda s: {k: v * float("nan") for k, v in s.items()}), RERANK, ["not finite"]),
    "NaN in the LM": (broken_lm, UPR, ["the LM's logits are not finite", "bfloat16 or float32"]),
    "no LM": (without("lm"), UPR, ["cannot load the base LM", "/lm"]),
    "LM without tokenizer": (without("lm/tokenizer.json"), UPR, ["tokenizer"]),
    "LM cut short": (half_file("lm/model.safetensors"), UPR, ["cannot load the base LM"]),
    # options
    "no method": (nothing, "rerank --data {job}/data --output {out}", ["expected --model ADAPTER"]),
    "no LM for UPR": (nothing, "rerank --upr --data {job}/data --output {out}", ["expected --base-model LM"]),
    "--top-k 0": (nothing, RERANK + " --top-k 0", ["--top-k must be at least 1, got 0"]),
    "--max-query-tokens 0": (nothing, RERANK + " --max-query-tokens 0", ["--max-query-tokens must be at least 1"]),
    "--max-document-tokens 0": (nothing, TRAIN + " --max-document-tokens 0", ["max_document_tokens must be at"]),
    "--top-k many": (nothing, RERANK + " --top-k many", ["'--top-k'", "valid integer"]),
    "--k 0": (nothing, TRAIN + " --clues top_k --k 0", ["k must be at least 1, got 0"]),
    "--num-heads of other clues": (
        nothing,
        TRAIN + " --num-heads 4",
        ["--num-heads 4 is of --clues attention and does nothing with top_k"],
    ),
    "--k of other clues": (
        nothing,
        TRAIN + " --clues attention --k 4",
        ["--k 4 is of --clues top_k and does nothing with attention"],
    ),
    "--clues typo": (nothing, TRAIN + " --k 4 --clues topk", ["clues must be one of", "did you mean 'top_k'"]),
    "--clues none": (nothing, TRAIN + " --clues none", ["nothing to train", "qpeft rerank --upr"]),
    "--num-heads 5": (
        nothing,
        TRAIN + " --clues attention --num-heads 5",
        ["num_heads must divide the embedding width 32, got 5"],
    ),
    "--loss typo": (nothing, TRAIN + " --loss list", ["loss must be one of", "'list'"]),
    "--learning-rate nan": (nothing, TRAIN + " --learning-rate nan", ["--learning-rate", "must be above 0, got nan"]),
    "no training data": (nothing, "train --base-model {job}/lm --output {out}", ["--data FOLDER or --train FILE"]),
    "--dtype float8": (nothing, RERANK + " --dtype float8", ["dtype must be", "'float8'"]),
    "--device tpu0": (nothing, RERANK + " --device tpu0", ["the device 'tpu0' cannot be used", "try --device cpu"]),
    "--max-tokens-per-batch 0": (nothing, RERANK + " --max-tokens-per-batch 0", ["must be at least 1, got 0"]),
    "unknown measure": (nothing, EVALUATE + " --measures nDCG@ten", ["unknown measure 'nDCG@ten'", "such as nDCG@10"]),
    "unknown measure, known early": (nothing, BM25 + " --measures DCG@10@", ["unknown measure 'DCG@10@'"]),
    "unknown test": (
        content("data/b.trec", b"q1 Q0 d1 1 1.0 t"),
        EVALUATE + " {job}/data/b.trec --test chi2",
        ["test must be one of t-test, permutation, got 'chi2'"],
    ),
    "run given twice": (nothing, EVALUATE + " {job}/data/run.trec", ["each run can be given once only"]),
    "unknown option": (nothing, RERANK + " --top 3", ["No such option: --top", "--help"]),
    "option missing": (nothing, "rerank --model {job}/adapter --data {job}/data", ["Missing option '--output'"]),
    "unknown command": (nothing, "reranking", ["No such command 'reranking'"]),
    "demo without queries": (nothing, "demo --queries 0", ["--queries must be at least 1, got 0"]),
    # output
    "output in no folder": (nothing, RERANK + "/no/run.trec", ["the folder", "/no does not exist", "create it first"]),
    "output is a folder": (nothing, RERANK.replace("{out}", "{job}"), ["is a folder", "name of a file to write"]),
    "output is a device": (nothing, RERANK.replace("{out}", "/dev/null"), ["/dev/null is not a regular file"]),
    "output is a dash": (nothing, RERANK.replace("{out}", "-"), ["got -; results are not written to the standard"]),
    "output below a file": (
        nothing,
        EVALUATE.replace("{out}", "{job}/data/run.trec/x"),
        ["cannot write", "/data/run.trec is no folder"],
    ),
    "unwritable output": (nothing, RERANK.replace("{out}", "/proc/run.trec"), ["cannot write /proc/run.trec: "]),
    "adapter into a file": (nothing, TRAIN.replace("{out}", "{job}/data/run.trec"), ["run.trec is a file"]),
    "adapter over another": (
        nothing,
        TRAIN.replace("{out}", "{job}/adapter"),
        ["already holds an adapter", "--overwrite"],
    ),
    "cache that cannot be made": (nothing, RERANK, ["cache", "set QPEFT_CACHE to a folder that can be written"]),
}
