"""docs/scaling.md says what benchmarks/scaling.py computes, and that is what the engine does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families.tiny import tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.engine.causal import CausalEngine

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

scaling = pytest.importorskip("scaling")

QUERIES = ["tides", "boats", "lamps"]  # of equal length in tokens, as are the documents: nothing is padded
DOCUMENTS = ["the sea at noon", "the sea at dawn", "the sea at dusk", "the sea at four"]


class Tokens:
    """Counts the tokens that enter the first layer of an LM; those with a gradient twice, for the backward pass."""

    def __init__(self, model) -> None:
        self.layer, self.count = model.lm.get_decoder().layers[0], 0

    def __enter__(self):
        def count(_, arguments, options):
            hidden = arguments[0] if arguments else options["hidden_states"]
            self.count += hidden.shape[0] * hidden.shape[1] * (2 if hidden.requires_grad else 1)

        self.hook = self.layer.register_forward_pre_hook(count, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.hook.remove()


@pytest.fixture(scope="module")
def model():
    config = qpeft.QPeftConfig(clues="attention", num_heads=4, rank=8)
    return qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer())


@pytest.fixture(scope="module")
def lengths(model):
    """The number of tokens of a prefix, and of a suffix with its clues and its query."""
    prompt = model.prompt
    prefixes = {len(prefix.ids) for prefix in prompt.documents(DOCUMENTS)}
    queries = {len(query) for query in prompt.queries(QUERIES)}
    assert len(prefixes) == len(queries) == 1
    query = queries.pop()
    # one clue per query token; the last query token is predicted, but nothing follows it, so it is not read
    return prefixes.pop(), len(prompt.suffix.hints) + query + len(prompt.suffix.question) + query - 1


@pytest.mark.parametrize("documents", [DOCUMENTS, DOCUMENTS[:1]])
def test_token_counts_of_reranking(model, lengths, documents):
    pairs = [(query, document) for query in QUERIES for document in documents]
    expected = scaling.rerank_tokens(len(pairs), len(documents), *lengths)
    cache = qpeft.DocumentCache(1 << 20)
    for name, options in (
        ("plain", {"path": "plain"}),
        ("cold", {}),
        ("cold", {"cache": cache}),
        ("warm", {"cache": cache}),
    ):
        with Tokens(model) as tokens:
            model.score(pairs, **options)
        assert tokens.count == expected[name], name


def test_token_counts_of_training(model, lengths):
    """3 queries and 3 documents each, as a step with in-batch negatives has them."""
    pairs = [(query, document) for query in QUERIES for document in DOCUMENTS]
    prefix, suffix = lengths
    cache = qpeft.DocumentCache(1 << 20)
    for options, expected in (
        ({"path": "plain"}, 2 * 12 * (prefix + suffix)),
        ({"cache": cache}, 4 * prefix + 2 * 12 * suffix),
        ({"cache": cache}, 2 * 12 * suffix),
    ):
        with Tokens(model) as tokens:
            scores = model(model.encode(pairs), **options).query_log_likelihood
        assert scores.requires_grad and tokens.count == expected
    # the same counting, at the size of the page
    assert list(scaling.train_tokens().values()) == [28_224, 16_128, 4_256, 2_560]


def test_flops_are_those_of_the_products():
    """torch counts the FLOPs of a plain pass of a tiny Llama; attention in full, since masked products are computed."""
    from torch.utils.flop_counter import FlopCounterMode

    lm = tiny_lm("llama")
    lm.set_attn_implementation("eager")
    config, tokens = lm.config, 24
    shape = scaling.Shape(
        "tiny",
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.hidden_size // config.num_attention_heads,
        config.intermediate_size,
        config.vocab_size,
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        lm(torch.zeros(1, tokens, dtype=torch.long))
    masked = shape.layers * tokens * 4 * shape.heads * shape.head_width * tokens / 2
    rotary = config.hidden_size // config.num_attention_heads * tokens  # positions times frequencies: a product too
    assert counter.get_total_flops() == pytest.approx(
        shape.flops(tokens, head_tokens=tokens) + masked + rotary, rel=1e-3
    )
    cache = CausalEngine(lm).prefill([[1] * tokens])
    assert cache.nbytes == tokens * shape.kv_bytes * 2  # float32 here, 16 bits there


def test_the_cache_formula_is_the_simulation():
    shares = scaling.popularity(2_000)
    for capacity in (20, 200, 1_000):
        assert scaling.hit_rate(shares, capacity) == pytest.approx(
            scaling.simulated_hit_rate(shares, capacity), abs=0.015
        )


def test_break_even():
    """At the break-even bandwidth reading takes as long as computing: then no number of queries pays."""
    shape = scaling.SHAPES[1]
    bandwidth = scaling.break_even_bandwidth(shape, 1e14)
    assert scaling.break_even_queries(shape, 1e14, 0.999 * bandwidth) == float("inf")
    assert scaling.break_even_queries(shape, 1e14, 3 * bandwidth) == pytest.approx(2)


def test_the_page_shows_it():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
