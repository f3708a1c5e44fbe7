"""Hostile calls of the public operators: the kernels against the PyTorch definitions.

Sizes of 0 and 1, any strides, junk under False masks, ids out of range, NaN, and scales at which a softmax has scores
of 1e5. Numbers are small integers, so that products are exact in float32, and the definition in float64 is right.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.public_shapes import definitions
from fuzz.runner import run

from qpeft_ext.ops import ProjectedTable, clue_attention, similarity_topk, token_log_likelihood

layouts = st.sampled_from(["plain", "plain", "columns first", "every other", "reversed axes"])
few = st.sampled_from([1, 1, 2, 3])
any_size = st.sampled_from([1, 1, 0, 2, 5])
dtypes = st.sampled_from([torch.float32, torch.float32, torch.float64])
powers = st.integers(-2, 2).map(lambda e: 2.0 ** (4 * e))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides."""
    if layout == "columns first" and x.dim() > 1:
        return x.mT.contiguous().mT
    if layout == "every other":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "reversed axes":
        order = list(range(x.dim()))[::-1]
        return x.permute(order).contiguous().permute(order)
    return x


class Draw:
    """Tensors of one case, from one seed: shrinking then works on shapes and layouts."""

    def __init__(self, data, dtype: torch.dtype) -> None:
        self.data, self.dtype = data, dtype
        self.random = torch.Generator().manual_seed(data.draw(st.integers(0, 1000), "seed"))

    def __call__(self, strategy, label=None):
        return self.data.draw(strategy, label)

    def integers(self, *shape: int, most: int = 2) -> Tensor:
        x = torch.randint(-most, most + 1, shape, generator=self.random).to(self.dtype)
        return laid_out(x, self(layouts))

    def ids(self, size: int, *shape: int) -> Tensor:
        return laid_out(torch.randint(max(size, 1), shape, generator=self.random), self(layouts))

    def mask(self, *shape: int) -> Tensor:
        share = self(st.sampled_from([1.0, 0.6, 0.0]))
        return laid_out(torch.rand(*shape, generator=self.random) < share, self(layouts))

    def spoil(self, ids: Tensor, mask: Tensor, size: int) -> Tensor:
        """Ids that must not be read, and now and then one that must raise."""
        junk = torch.tensor([-1, size + 5, 2**40])[torch.arange(ids.numel()) % 3].view(ids.shape)
        ids = torch.where(mask, ids, junk).contiguous()
        wrong = self(st.sampled_from([None] * 9 + [-1, size, 2**40]), "wrong id")
        if wrong is not None and ids.numel():
            ids[(-1,) * ids.dim()] = wrong
        return laid_out(ids, self(layouts))

    def documents(self, D: int):
        """Arguments of clue_attention and similarity_topk."""
        Q, T, B, S = (self(any_size, name) for name in "QTBS")
        V = self(few, "V")
        assume(Q or not B)
        query_mask, document_mask = self.mask(Q, T), self.mask(B, S)
        document_ids = self.spoil(self.ids(V, B, S), document_mask, V)
        query = self.integers(Q, T, D).masked_fill(~query_mask[..., None], torch.nan)
        return query, query_mask, self.integers(V, D), document_ids, document_mask, self.ids(Q, B)


def outcome(function, inputs: dict, wanted: list[str]):
    """("ok", results and gradients) or (class of the error, its words)."""
    inputs = {name: x.detach().requires_grad_() if name in wanted else x for name, x in inputs.items()}
    try:
        results = function(**inputs)
    except (ValueError, TypeError, IndexError) as error:
        return type(error), str(error)
    results = (results,) if isinstance(results, Tensor) else tuple(results)
    first = results[0]
    weights = torch.arange(first.numel(), dtype=first.dtype).view(first.shape) % 7 - 3
    loss = (first.masked_fill(first == -torch.inf, 0) * weights).sum()
    if not loss.requires_grad:  # nothing was read
        results += tuple(torch.zeros_like(inputs[name]) for name in wanted)
    else:
        results += torch.autograd.grad(loss, [inputs[name] for name in wanted], materialize_grads=True)
    return "ok", results


def compare(function, inputs: dict, wanted: list[str], sizes: tuple[float, float] = (0, 0), **settings) -> None:
    """The kernels, the definition in the same dtype, and the definition in float64, which is the right value.

    Ours may have four times the error of the definition, an error of 1e-5 of the largest number, and the rounding of
    some terms of ``sizes`` (of values, of gradients), which may cancel.
    """
    kind, ours = outcome(function, inputs | settings, wanted)
    exact = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}
    with definitions():
        their_kind, theirs = outcome(function, inputs | settings, wanted)
        _, truth = outcome(function, exact | settings, wanted)
    assert kind == their_kind, (kind, ours if kind != "ok" else "", their_kind, theirs if their_kind != "ok" else "")
    if kind != "ok":
        assert ours == theirs
        return
    assert len(ours) == len(theirs) == len(truth)
    for i, (a, b, c) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        if not a.is_floating_point():
            assert torch.equal(a, b), (i, a, b)
            continue
        assert torch.equal(a.isnan(), c.isnan()), (i, a, b, c)
        finite = c.isfinite()
        assert torch.equal(a[~finite].nan_to_num(), c[~finite].to(a.dtype).nan_to_num()), (i, a, b, c)
        if finite.any():
            error, their_error = ((x[finite].double() - c[finite]).abs().nan_to_num(0).max() for x in (a, b))
            rounding = 4 * torch.finfo(a.dtype).eps * sizes[i > 0]
            allowed = 4 * their_error + 1e-5 * c[finite].abs().max() + rounding + 1e-30
            assert error <= allowed, f"result {i}: error {error:.2e}, definition's own {their_error:.2e}\n{a}\n{c}"


@given(st.data(), dtypes)
def attention(data, dtype):
    draw = Draw(data, dtype)
    H, d = draw(few, "H"), draw(st.sampled_from([1, 4, 4, 0]), "d")  # the scale 1 / sqrt(d) is exact
    D = H * d
    documents = dict(zip(("query_embeds", "query_mask", "table", "document_ids", "document_mask", "query_index"),
                         draw.documents(D), strict=True))  # fmt: skip
    weights = {name: draw.integers(D, D) for name in ("w_q", "w_k", "w_v", "w_o")}
    biases = {name: draw.integers(D) if draw(st.booleans()) else None for name in ("b_q", "b_v", "b_o")}
    scale = draw(st.sampled_from([1, 1, 8, 32, 2**-8]), "scale")
    documents["table"] = documents["table"] * scale
    inputs = {**documents, **weights, **biases}
    wanted = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]
    if draw(st.integers(0, 7), "some gradients") == 0:
        wanted = wanted[:1]
    if draw(st.integers(0, 7), "NaN") == 0 and D:
        inputs["table"][-1, -1], wanted = torch.nan, []
    values = (2 * D + 2) ** 2 * scale * 2
    compare(clue_attention, inputs, wanted, (values, 3 * values**2 * (2 * D + 2) ** 2), num_heads=H)
    with torch.no_grad():
        kind, whole = outcome(clue_attention, {**inputs, "num_heads": H}, [])
        if kind == "ok" and D:
            rows = draw(st.integers(0, 3), "rows")
            store = ProjectedTable(inputs["table"], weights["w_k"], weights["w_v"], None, biases["b_v"],
                                   budget_bytes=rows * 2 * D * dtype.itemsize)  # fmt: skip
            projected = store.attend(*(x for name, x in documents.items() if name != "table"), weights["w_q"],
                                     weights["w_o"], biases["b_q"], biases["b_o"], num_heads=H)  # fmt: skip
            torch.testing.assert_close(projected, whole[0], rtol=1e-4, atol=1e-6 * values, equal_nan=True)


@given(st.data(), dtypes, st.sampled_from(["dot", "cosine"]))
def topk(data, dtype, metric):
    draw = Draw(data, dtype)
    names = ("query_embeds", "query_mask", "table", "document_ids", "document_mask", "query_index")
    inputs = dict(zip(names, draw.documents(draw(st.sampled_from([1, 1, 0, 2, 3]), "D")), strict=True))
    inputs["table"] = inputs["table"] * draw(powers, "scale")
    if draw(st.integers(0, 7), "NaN") == 0 and inputs["table"].numel():
        inputs["table"][-1, -1] = torch.nan
    wanted = ["query_embeds", "table"] if draw(st.booleans()) else ["query_embeds"]
    compare(similarity_topk, inputs, wanted, k=draw(st.sampled_from([1, 2, 7]), "k"), metric=metric)


@given(st.data(), dtypes)
def likelihood(data, dtype):
    draw = Draw(data, dtype)
    N, D = draw(any_size, "N"), draw(any_size, "D")
    V = draw(st.sampled_from([1, 2, 17, 40] if N else [0, 1, 17]), "V")
    inputs = {"hidden": draw.integers(N, D), "lm_head": draw.integers(V, D)}
    inputs["target_ids"] = draw.spoil(draw.ids(V, N), torch.ones(N, dtype=torch.bool), V)
    inputs["bias"] = draw.integers(V) if draw(st.booleans(), "bias") else None
    scale = draw(st.sampled_from([1, 1, 64, 2**14, 2**-10]), "scale")
    inputs["hidden"] = inputs["hidden"] * scale
    wanted = ["hidden", "lm_head", "bias"]
    trouble = draw(st.sampled_from([None, None, None, "NaN", "forbidden"]), "trouble")
    if trouble:
        wanted = []
        words = slice(0, draw(st.sampled_from([1, 16, V]), "words"))
        if trouble == "NaN":
            inputs["lm_head"][words] = torch.nan
        elif inputs["bias"] is not None:
            inputs["bias"][words] = -torch.inf
    settings = {
        "soft_cap": draw(st.sampled_from([None, None, 3.0, 1e-50, 1e-10, 1e4, 1e30]), "soft_cap"),
        "logit_scale": draw(st.sampled_from([1.0, 1.0, 0.25, 0.0, -2.0]), "logit_scale"),
        "chunk_bytes": draw(st.sampled_from([1, 100, 5000, 1 << 20]), "chunk_bytes"),
    }
    wanted = [name for name in wanted if inputs[name] is not None]
    # probabilities of the gradient to lm_head and bias come from lse, whose error is that of a float of its size
    factor = scale * abs(settings["logit_scale"])
    largest = 4 * D * factor + 2
    compare(token_log_likelihood, inputs, wanted, (min(largest, 64), largest * 3 * N * (1 + 2 * factor)), **settings)


if __name__ == "__main__":
    run(attention, topk, likelihood)
