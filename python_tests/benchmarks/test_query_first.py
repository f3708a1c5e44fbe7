"""`benchmarks/bench_query_first.py`: sentence-transformers and ours give the same scores, on a tiny LM."""

import sys
from pathlib import Path

import pytest
import torch
from families.tiny import tiny_lm
from prompts.reranker_tokenizers import qwen_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

pytestmark = pytest.mark.slow


def test_a_cross_encoder_gives_the_same_scores(tmp_path):
    pytest.importorskip("sentence_transformers", minversion="5.4", reason="sentence-transformers is not installed")
    bench = pytest.importorskip("bench_query_first")
    tokenizer = qwen_tokenizer()
    for part in (tiny_lm("qwen3", vocab_size=len(tokenizer), max_position_embeddings=2048), tokenizer):
        part.save_pretrained(tmp_path)
    systems = bench.Systems(str(tmp_path), torch.device("cpu"))
    documents = ["because the moon pulls the sea.", "(boats)", {"title": "Moon", "text": "pulls 10 seas"}]
    work = [("why do the tides rise?", documents), ("boats", documents)]
    assert bench.check(systems, work) < 1e-4
    scores = systems.ours(*work[0])
    assert scores.max() - scores.min() > 0.01
