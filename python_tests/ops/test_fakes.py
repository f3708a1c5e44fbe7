"""What torch.compile is told of results is true: shapes, dtypes and strides, for inputs with any strides."""

import pytest
import torch
from inputs import make_documents
from torch import Tensor
from torch._subclasses import FakeTensorMode

from qpeft_ext.ops import causal_attention, gated_silu, joined_prefixes, rms_norm, rotary  # noqa: F401  (their fakes)
from qpeft_ext.ops._library import registered
from qpeft_ext.ops.int8_linear import Int8Weight

pytestmark = pytest.mark.skipif(not registered("int8_linear"), reason="the library is not loaded")


def calls(dtype: torch.dtype) -> dict[str, tuple]:
    """Return arguments for each operator that has a fake and that every processor can run."""
    x, random, ops = make_documents(dtype=dtype), torch.Generator().manual_seed(0), torch.ops.qpeft_ext

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    chosen = ops.similarity_topk(*x, 4, "cosine")
    heads = (normal(3, 5, 4, 16), *x[2:], normal(16, 16))
    mixed, of_scores = ops.clue_attention_heads(*heads)
    tokens = (normal(6, 16), normal(37, 16), torch.arange(6), normal(37), 3.0, 1.0, 1000)
    log_p, lse, _ = ops.token_log_likelihood(*tokens, True)
    rows, weight, large = normal(5, 12), normal(12), normal(2, 4, 3, 16)
    found = {
        "similarity_topk": (*x, 4, "cosine"),
        "similarity_topk_backward": (chosen[0] * 2, *chosen, x.query_embeds, x.table, x.query_index, "cosine", True),
        "clue_attention_heads": heads,
        "clue_attention_heads_backward": (mixed, of_scores, *heads, True),
        "token_log_likelihood": (*tokens, True),
        "token_log_likelihood_backward": (log_p, lse, *tokens),
        "rms_norm": (rows, weight, 1e-5),
        "rms_norm_backward": (rows, rows, weight, torch.ones(5)),
        "gated_silu": (rows, rows),
        "gated_silu_backward": (rows, rows, rows),
        "rotary": (large, normal(2, 3, 16), normal(2, 3, 16)),
        "joined_prefixes": ([normal(1, 4, 5, 16)], [0, 0], large, 7),
    }
    if dtype == torch.float32:
        keys = normal(2, 2, 5, 16)
        found["causal_attention"] = (large, keys, keys, [0, 1], 1.0)
        found["int8_linear"] = (normal(3, 64), *Int8Weight.of(normal(32, 64), [1]), normal(32))
    return found


def outer_axes_exchanged(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x


def all_axes_reversed(x: Tensor) -> Tensor:
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def with_room_behind_rows(x: Tensor) -> Tensor:
    return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]


LAST_STRIDE_OF_1 = ("rotary", "causal_attention")


@pytest.mark.parametrize("layout", [outer_axes_exchanged, all_axes_reversed, with_room_behind_rows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fakes_are_like_the_results(layout, dtype):
    for name, arguments in calls(dtype).items():
        if layout is all_axes_reversed and name in LAST_STRIDE_OF_1:
            continue
        arguments = [layout(x) if isinstance(x, Tensor) else x for x in arguments]
        operator = getattr(torch.ops.qpeft_ext, name)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = operator(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
        real = operator(*arguments)
        for ours, theirs in zip(*((y,) if isinstance(y, Tensor) else y for y in (fake, real)), strict=True):
            told, true = ((y.shape, y.dtype, y.stride()) for y in (ours, theirs))
            assert told == true, name
