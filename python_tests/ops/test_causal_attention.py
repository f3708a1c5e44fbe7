"""Attention to all keys up to a query's own: against its definition in float64, for both sets of instructions."""

import os
import subprocess
import sys

import pytest
import torch

from qpeft_ext.ops._library import registered
from qpeft_ext.ops.causal_attention import causal_attention, is_faster, reference

native = pytest.mark.skipif(not registered("causal_attention"), reason="the library is not loaded")
# items, heads of queries, heads of keys, queries, keys, width, first keys
SHAPES = [
    (3, 9, 3, 27, 187, 64, (0, 5, 160)), (2, 4, 4, 40, 40, 32, (0, 17)), (1, 8, 1, 1, 300, 128, (3,)),
    (4, 2, 1, 5, 9, 16, (0, 4, 1, 3)), (2, 3, 3, 70, 70, 80, (69, 0)), (1, 1, 1, 1, 1, 16, (0,)),
    (2, 6, 2, 3, 20, 48, (20, 16)), (2, 2, 2, 0, 4, 16, (0, 0)), (0, 2, 2, 3, 4, 16, ()),
]  # fmt: skip


def inputs(B, H, K, L, T, D, starts):
    random = torch.Generator().manual_seed(B + H + L + T)
    shapes = ((B, H, L, D), (B, K, T, D), (B, K, T, D))
    query, key, value = (torch.randn(shape, generator=random) for shape in shapes)
    return query, key, value, list(starts), 0.3


@native
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_definition(shape):
    given = inputs(*shape)
    found, expected = causal_attention(*given), reference(*given)
    assert found.shape == expected.shape and found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=5e-6)


@native
def test_it_is_the_definition_without_wide_vectors_too():
    """A process reads the cap once."""
    script = "import sys; sys.path[:0] = sys.argv[1:]; import ops.test_causal_attention as own\n"
    script += "from qpeft_ext.ops.causal_attention import _FASTER; assert not _FASTER\n"
    script += "for shape in own.SHAPES: own.test_it_is_the_definition(shape)"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    tests = os.path.dirname(os.path.dirname(__file__))
    subprocess.run([sys.executable, "-c", script, tests], check=True, env=environment)


@native
def test_other_strides():
    query, key, value, starts, scale = inputs(*SHAPES[0])
    expected = causal_attention(query, key, value, starts, scale)
    others = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    assert torch.equal(causal_attention(*others, starts, scale), expected)
    others = [x.mT.contiguous().mT for x in (query, key, value)]
    assert torch.equal(causal_attention(*others, starts, scale), expected)


@native
def test_an_item_and_a_query_do_not_depend_on_the_others():
    query, key, value, starts, scale = inputs(3, 6, 3, 33, 90, 32, (0, 11, 40))
    together = causal_attention(query, key, value, starts, scale)
    for b in range(3):
        alone = causal_attention(query[b : b + 1], key[b : b + 1], value[b : b + 1], starts[b : b + 1], scale)
        assert torch.equal(alone[0], together[b])
    last = causal_attention(query[:, :, -1:], key, value, starts, scale)
    assert torch.equal(last[:, 0], together[:, -1])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(causal_attention(query, key, value, starts, scale), together)
    finally:
        torch.set_num_threads(threads)


@native
def test_numbers_behind_the_last_key_are_not_looked_at():
    """Nor those before the first: padding may hold anything."""
    query, key, value, starts, scale = inputs(2, 4, 2, 20, 50, 16, (0, 21))
    expected = causal_attention(query, key, value, starts, scale)
    key[1, :, :21], value[1, :, :21] = torch.nan, torch.inf
    assert torch.equal(causal_attention(query, key, value, starts, scale), expected)
    key[:, :, 49], value[:, :, 49] = -1e30, 1e30
    assert torch.equal(causal_attention(query, key, value, starts, scale)[:, :-1], expected[:, :-1])


@native
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen(number):
    query, key, value, starts, scale = inputs(*SHAPES[1])
    key[0, :, 3, 5] = number
    found = causal_attention(query, key, value, starts, scale)
    assert not found[0, 3:].isfinite().all() and found[0, :3].isfinite().all() and found[1].isfinite().all()


@native
def test_impossible_inputs_are_errors():
    query, key, value, starts, scale = inputs(*SHAPES[3])
    for wrong, words in (
        ((query[..., :8], key, value, starts), "multiple of 16"), ((query, key[:, :, :3], value, starts), "value must"),
        ((query, key[:, :, :3], value[:, :, :3], starts), "as many keys as queries"),
        ((query, key, value, starts[:2]), "starts must have 4"), ((query, key, value, [0, 0, 0, 10]), "starts must be"),
        ((query, key, value, [0, 0, 0, -1]), "starts must be"), ((query.double(), key, value, starts), "float32"),
        ((query[:, :1].expand(4, 3, 5, 16), key.expand(4, 2, 9, 16), value, starts), "key must"),
        ((query[0], key, value, starts), "4 dimensions"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=words):
            causal_attention(*wrong, scale)


@native
def test_where_it_is_taken():
    query, key, value, *_ = inputs(*SHAPES[0])
    if not torch.ops.qpeft_ext.causal_attention_is_faster():
        pytest.skip("this processor has no AVX-512")
    assert is_faster(query, key, value)
    assert not is_faster(query.requires_grad_(), key, value)
    with torch.no_grad():
        assert is_faster(query, key, value)
        assert not is_faster(query[..., :8], key[..., :8], value[..., :8])
        assert not is_faster(query.bfloat16(), key.bfloat16(), value.bfloat16())
        assert not is_faster(query, key[:, :, :9], value[:, :, :9])


@pytest.mark.slow
@native
def test_compiled():
    arguments = inputs(*SHAPES[3])
    assert torch.library.opcheck(torch.ops.qpeft_ext.causal_attention.default, arguments).keys()
