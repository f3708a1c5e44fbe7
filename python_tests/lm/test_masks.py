"""What attention masks say, and attention over documents one by one where a mask says that they are."""

import pytest
import torch

from qpeft_ext.lm.attention import attention, this_thread
from qpeft_ext.lm.masks import KnownMasks, Mask
from qpeft_ext.lm.passes import _faster_attention


def causal(starts, L=6):
    slots = torch.arange(L)
    return torch.stack([(slots <= slots[:, None]) & (slots >= start) for start in starts])[:, None]


def test_a_left_padded_causal_mask_is_known_by_its_starts():
    assert Mask(causal([0, 2, 5])).starts == [0, 2, 5]
    seen = causal([3])
    seen[0, 0, :3, :3] = ~torch.eye(3, dtype=torch.bool)  # what padding sees of others does not matter
    assert Mask(seen).starts == [3]


def test_suffixes_behind_prefixes_are_known_by_them_too():
    """Prefixes are padded on the left, suffixes on the right."""
    seen = causal([0, 2, 4], 9)[:, :, 5:]
    assert Mask(seen).starts == [0, 2, 4]
    seen[1, 0, :, 7:] = False  # two slots of padding, which see no token of their own
    assert Mask(seen).starts == [0, 2, 4]
    seen[0, 0, :2, 0] = False  # a token that sees less than the last one
    assert Mask(seen).starts is None
    assert Mask(causal([3, 1])[:, :, 5:]).starts == [3, 1]  # one query


@pytest.mark.parametrize("change", [
    lambda m: m[..., 4:, :] & (torch.arange(6) != 3),
    lambda m: m & ~torch.tril(torch.ones(6, 6, dtype=torch.bool), -3),  # a sliding window
    lambda m: m | torch.eye(6, dtype=torch.bool).roll(1, 1),  # a token that sees the next one
    lambda m: torch.where(m, 0.0, -torch.inf),
    lambda m: m & (torch.arange(6) != 4),  # a hole
    lambda m: m & (torch.arange(6)[:, None] // 3 == torch.arange(6) // 3),  # two chunks
    torch.zeros_like,  # padding only
])  # fmt: skip
def test_other_masks_are_not(change):
    assert Mask(change(causal([0, 2]))).starts is None


def test_a_bool_mask_as_numbers():
    mask = Mask(causal([0, 2]))
    added = mask.added(torch.float32)
    assert torch.equal(added, torch.where(mask.mask, 0.0, -torch.inf)) and mask.added(torch.float32) is added
    assert mask.added(torch.bfloat16).dtype == torch.bfloat16
    assert Mask(added).added(torch.float32) is added


def test_masks_of_a_pass_are_read_once_and_forgotten():
    known, mask = KnownMasks(), causal([1])
    assert known.of(mask) is known.of(mask) and known.of(mask) is not known.of(causal([1]))
    before = known.of(mask)
    known.forget()
    assert known.of(mask) is not before


@pytest.mark.parametrize("starts", [[0], [0, 2, 5], [4]])
@pytest.mark.parametrize("rows", [1, None])
def test_attention_of_documents_one_by_one(monkeypatch, starts, rows):
    """Against softmax in float64; one mask may be that of all documents."""
    starts = starts[:rows]
    B = 3 if rows else len(starts)
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(B, heads, 6, 8, generator=random) for heads in (4, 2, 2))
    monkeypatch.setattr(this_thread, "passes", 1)
    mask = causal(starts)
    found, _ = attention(torch.nn.Module(), query, key, value, mask, scaling=0.5)
    this_thread.masks.forget()
    keys, values = (x.double().repeat_interleave(2, 1) for x in (key, value))
    scores = (0.5 * query.double() @ keys.mT).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    for b in range(B):
        start = starts[min(b, len(starts) - 1)]
        torch.testing.assert_close(found[b, start:].double(), expected[b, start:], rtol=1e-5, atol=1e-6)
        assert not found[b, :start].any()


def test_masks_are_forgotten_at_the_end_of_a_pass():
    """Else they would stay in memory, one for each pass."""
    with _faster_attention([]):
        known = this_thread.masks.of(mask := causal([1]))
        assert this_thread.masks.of(mask) is known
    assert this_thread.masks.of(mask) is not known
    this_thread.masks.forget()
