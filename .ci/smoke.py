"""Check that an installed qpeft_ext works, and say so in one line. `make wheel` and `make matrix` run it elsewhere.

The kernels are live; the operators equal their definitions in values and gradients; the packaged demo adapter ranks, by
shared prefixes and by whole prompts alike; a step of training lowers the loss; `qpeft info` ends well.
"""

import contextlib
import io
import sys
from pathlib import Path

import torch

import qpeft_ext as qpeft
from qpeft_ext import ops
from qpeft_ext.cli import app as cli
from qpeft_ext.ops import _library, clue_attention, similarity_topk, token_log_likelihood  # noqa: F401  the functions
from qpeft_ext.ops.clue_attention import reference as clue_attention_reference
from qpeft_ext.ops.similarity_topk import reference as similarity_topk_reference
from qpeft_ext.ops.token_log_likelihood import reference as token_log_likelihood_reference

QUERY = "what makes the tides rise and fall"
DOCUMENTS = [
    "A list holds objects in the order in which they were added.",
    "The tides rise and fall since the moon pulls the water of the sea.",
    "The compiler reads a file and writes an object file.",
]


def operators() -> None:
    torch.manual_seed(0)
    Q, T, B, S, V, D, H = 2, 5, 4, 30, 50, 16, 4
    ids, mask, query_index = torch.randint(0, V, (B, S)), torch.rand(B, S) < 0.8, torch.tensor([0, 1, 1, 0])
    query_mask = torch.ones(Q, T, dtype=torch.bool)
    weights = [torch.randn(D, D) / 4 for _ in range(4)]

    def compare(op, reference, *inputs):
        found = []
        for function in (op, reference):
            first = torch.randn(Q, T, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
            result = function(first, *inputs)
            result.square().sum().backward()
            found.append((result.detach(), first.grad))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)

    documents = (query_mask, torch.randn(V, D), ids, mask, query_index)
    compare(lambda *x: similarity_topk(*x).scores, lambda *x: similarity_topk_reference(*x).scores, *documents, 5)
    compare(lambda *x: clue_attention(*x, num_heads=H), lambda *x: clue_attention_reference(*x, num_heads=H),
            *documents, *weights)  # fmt: skip
    targets = (documents[1], torch.randint(0, V, (Q * T,)))
    compare(lambda x, *more: token_log_likelihood(x.flatten(0, 1), *more),
            lambda x, *more: token_log_likelihood_reference(x.flatten(0, 1), *more), *targets)  # fmt: skip


def packaged_model():
    from qpeft_ext.demo.adapters import ADAPTER
    from qpeft_ext.lm.loading import BASE_LM

    return qpeft.QPeftModel.from_pretrained(ADAPTER, qpeft.load_lm(BASE_LM, dtype="float32"), is_trainable=True)


def ranking(model) -> None:
    pairs = [(QUERY, document) for document in DOCUMENTS]
    model.eval()
    ranked = qpeft.Reranker(model, cache=qpeft.DocumentCache()).rank(QUERY, DOCUMENTS)
    assert ranked[0]["corpus_id"] == 1, ranked
    scores = [model.score(pairs, path=path).mean_query_log_likelihood for path in ("document_first", "plain")]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-4)


def training(model) -> None:
    model.train()
    batch = model.encode([(QUERY, document) for document in DOCUMENTS])
    parameters = [p for module in model.trained_modules.values() for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    losses = []
    for _ in range(3):
        scores = model(batch).mean_query_log_likelihood
        losses.append(-scores.log_softmax(0)[1])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0], losses


def main() -> None:
    assert not Path(qpeft.__file__).is_relative_to(Path(__file__).resolve().parents[1] / "qpeft_ext"), "the checkout's"
    live, why = _library.kernels_live()["cpu"]
    assert live, why
    operators()
    model = packaged_model()
    ranking(model)
    training(model)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli.main(["info"]) == 0
    assert qpeft.__version__ in said.getvalue() and ops.similarity_topk is similarity_topk
    import transformers

    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"ok: qpeft_ext {qpeft.__version__} with {versions}")


if __name__ == "__main__":
    main()
