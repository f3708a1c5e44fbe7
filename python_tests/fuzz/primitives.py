"""Direct calls of the primitives (csrc/ops.cpp) with hostile arguments: they may raise, but touch no memory of others.

Each call is a right one, changed in up to three places: shapes, dtypes, strides, ids, numbers, missing tensors. What a
wrong call did to memory is seen under `make sanitize` only; here it may not crash.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter

import torch
from torch import Tensor

import qpeft_ext.ops  # noqa: F401  loads the library

IDS = [-1, -2, 7, 2**31 - 1, 2**31, 2**40, -(2**63) + 1, 2**63 - 1]  # outside of every table here
NUMBERS = [0, -1, 1, 3, 2**31, 2**62, -(2**63), 2**63 - 1]  # what lies between would be honest, and gigabytes
FLOATS = [0.0, 1.0, -2.0, 1e-50, 1e300, float("inf"), float("nan")]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool]


class Call:
    """Right arguments of one primitive, of random sizes, many of them 0 and 1."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.sum = rng.choice([torch.float32, torch.float64])
        table = [torch.float32, torch.bfloat16, torch.float16] if self.sum == torch.float32 else [torch.float64]
        self.table = rng.choice(table)

    def size(self, least: int = 0) -> int:
        return max(least, self.rng.choice([0, 1, 1, 2, 3, 5, 17, 40]))

    def real(self, *shape: int, dtype=None) -> Tensor:
        return torch.randn(shape).to(dtype or self.sum)

    def whole(self, low: int, high: int, *shape: int, dtype=torch.int64) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, dtype=dtype)

    def maybe(self, x: Tensor) -> Tensor | None:
        return x if self.rng.random() < 0.5 else None

    def document_rows_distinct(self):
        B, S, G, V = self.size(), self.size(), self.size(1), self.size(1)
        return self.whole(0, V, B, S), torch.rand(B, S) < 0.7, self.whole(0, G, B), G, V

    def document_rows_gather(self):
        V, D, n = self.size(1), self.size(), self.size()
        block = self.real(n, D)
        return self.real(V, D, dtype=self.table), self.whole(-1, V, n), block, self.maybe(self.real(n))

    def weighted_rows(self):
        N, D, E, G = self.size(1), self.size(), self.size(), self.size()
        offsets = torch.cat((self.whole(0, E + 1, G + 1).sort().values,))
        source = self.real(N, D, dtype=self.table)
        return source, self.whole(0, N, E), self.maybe(self.real(E)), offsets, self.rng.random() < 0.5, self.real(G, D)

    def similarity_topk_reduce(self):
        n, M, T = self.size(), self.size(), self.size()
        positions = self.whole(0, 1, M, n, dtype=torch.int32)
        return self.real(n, M * T), self.maybe(self.real(n)), torch.rand(M, T) < 0.7, self.real(M, n), positions

    def similarity_topk_select(self):
        M, U, B, S = self.size(1), self.size(1), self.size(), self.size()
        best_positions, slots = self.whole(0, 9, M, U, dtype=torch.int32), self.whole(-1, U, B, S, dtype=torch.int32)
        rows, ids = self.whole(0, M, B), self.whole(0, 9, B, S)
        return self.real(M, U), best_positions, rows, self.maybe(self.real(U)), ids, slots, self.size(1)

    def _softmax(self):
        U, R, P, n = self.size(), self.size(), self.size(), self.size()
        slots = self.whole(-1, U, P, n, dtype=torch.int32)
        return self.real(U, R), slots, self.whole(0, 4, P, n, dtype=torch.int32), self.real(P, R), self.real(P, n, R)

    def clue_attention_lse(self):
        scores, slots, counts, lse, _ = self._softmax()
        return scores, slots, counts, self.rng.choice([0, 0, 1]), lse

    def clue_attention_weights(self):
        scores, slots, counts, lse, weights = self._softmax()
        return scores, slots, counts, lse, self.rng.choice([0, 0, 1]), weights

    def clue_attention_softmax_backward(self):
        _, slots, _, _, weights = self._softmax()
        return weights, slots, torch.randn_like(weights)

    def _chunk(self):
        N, C = self.size(), self.size()
        return self.real(N, C), self.maybe(self.real(C)), self.whole(0, 99, N), self.rng.choice([0, 7])

    def token_log_likelihood_chunk(self):
        logits, bias, targets, first = self._chunk()
        running, sums = self.real(3, len(logits)), self.maybe(self.real(len(logits), self.size()))
        return logits, bias, targets, first, 1.5, self.rng.choice([None, 3.0]), running, sums, self.sum

    def token_log_likelihood_finish(self):
        N, V, D = self.size(), self.size(1), self.size()
        running, head, targets = self.real(3, N), self.real(V, D, dtype=self.table), self.whole(0, V, N)
        sums, soft_cap = self.maybe(self.real(N, D)), self.rng.choice([None, 3.0])
        return running, head, targets, 1.5, soft_cap, self.real(N), self.real(N), sums

    def token_log_likelihood_chunk_backward(self):
        logits, bias, targets, first = self._chunk()
        N = len(logits)
        return logits, bias, targets, first, 1.5, self.rng.choice([None, 3.0]), self.real(N), self.real(N), self.sum

    def bfloat16_products(self):
        N, C, D = self.size(), self.size(), 2 * self.size()
        return self.real(N, D).bfloat16(), self.real(C, D).bfloat16(), self.real(N, C).float()

    def bfloat16_add_product(self):
        N, C, D = self.size(), self.size(), self.size()
        return self.real(N, D).float(), self.real(N, C).bfloat16(), self.real(C, D).bfloat16()

    def bfloat16_attention(self):
        B, K, L, T = self.size(), self.size(1), self.size(), self.size()
        query = self.real(B, 2 * K, L, 32).bfloat16()
        key, value = (self.real(B, K, T, 32).bfloat16() for _ in range(2))
        return query, key, value, torch.rand(B, 1, L, T) < 0.7, 0.5

    def bfloat16_attention_backward(self):
        query, key, value, mask, scale = self.bfloat16_attention()
        B, H, L, D = query.shape
        grad, out = (self.real(B, L, H, D).bfloat16() for _ in range(2))
        return grad, out, self.real(B, H, L).float(), query, key, value, mask, scale

    def _low(self, x):
        return x.bfloat16() if self.rng.random() < 0.5 else x.float()

    def rms_norm(self):
        x = self._low(self.real(self.size(), self.size()))
        return x, self.real(x.shape[1]).to(x.dtype), 1e-6

    def rms_norm_backward(self):
        x, weight, _ = self.rms_norm()
        return torch.randn_like(x), x, weight, self.real(len(x)).float()

    def gated_silu(self):
        gate = self._low(self.real(self.size(), self.size()))
        return gate, torch.randn_like(gate)

    def gated_silu_backward(self):
        gate, up = self.gated_silu()
        return torch.randn_like(gate), gate, up

    def rotary(self):
        B, L, D = self.size(), self.size(), 2 * self.size()
        x = self._low(self.real(B, self.size(), L, D))
        cos, sin = (self.real(self.rng.choice([1, B]), L, D).to(x.dtype) for _ in range(2))
        return x, cos, sin if sin.shape == cos.shape else cos, self.rng.random() < 0.5


PRIMITIVES = [name for name in vars(Call) if name[0] != "_" and hasattr(torch.ops.qpeft_ext, name)]


def place_in(x: Tensor, rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randrange(size) for size in x.shape)


def spoilt_tensor(x: Tensor, rng: random.Random, way: str) -> Tensor:
    if way == "ids" and x.dtype in (torch.int64, torch.int32) and x.numel():
        x, most = x.clone(), torch.iinfo(x.dtype).max
        x[place_in(x, rng)] = rng.choice([value for value in IDS if -most <= value <= most])
    elif way == "not numbers" and x.is_floating_point() and x.numel():
        x = x.clone()
        x[place_in(x, rng)] = rng.choice([torch.nan, torch.inf, -torch.inf])
    elif way == "strides" and x.dim():
        wide, backwards = x.new_zeros([2 * size + 1 for size in x.shape]), range(x.dim())[::-1]
        view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
        x = view.copy_(x) if rng.random() < 0.5 else x.permute(*backwards).contiguous().permute(*backwards)
    elif way == "expanded" and x.dim() and all(x.shape):
        axis = rng.randrange(x.dim())
        x = x.narrow(axis, 0, 1).expand(x.shape)
    elif way == "size" and x.dim():
        shape = list(x.shape)
        shape[rng.randrange(x.dim())] = rng.choice([0, 1, 2, 4, 18, 41])
        x = torch.zeros(shape, dtype=x.dtype)
    elif way == "dimensions":
        x = x[None] if rng.random() < 0.5 or not x.dim() else x.flatten() if x.dim() > 1 else x.sum()
    elif way == "dtype":
        x = x.to(rng.choice([dtype for dtype in DTYPES if dtype != x.dtype]))
    return x


WAYS = ["ids", "ids", "not numbers", "strides", "strides", "expanded", "size", "dimensions", "dtype"]


def call(rng: random.Random) -> tuple[str, str]:
    """One call; (name, how it ended)."""
    name = rng.choice(PRIMITIVES)
    torch.manual_seed(rng.randrange(2**31))
    arguments = list(getattr(Call(rng), name)())
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        at = rng.randrange(len(arguments))
        x = arguments[at]
        if isinstance(x, Tensor):
            arguments[at] = spoilt_tensor(x, rng, rng.choice(WAYS))
        elif isinstance(x, float):
            arguments[at] = rng.choice(FLOATS)
        elif type(x) is int:
            arguments[at] = rng.choice(NUMBERS)
        elif isinstance(x, torch.dtype):
            arguments[at] = rng.choice(DTYPES)
    try:
        getattr(torch.ops.qpeft_ext, name)(*arguments)
    except (RuntimeError, IndexError, MemoryError) as error:
        return name, type(error).__name__
    return name, "done"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, ends = random.Random(options.seed), Counter()
    for _ in range(options.count):
        ends[call(rng)] += 1
    for name in PRIMITIVES:
        print(name, {end: n for (of, end), n in sorted(ends.items()) if of == name})


if __name__ == "__main__":
    main()
