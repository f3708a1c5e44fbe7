"""Keys and values of prefixes: taken apart and put together."""

from __future__ import annotations

import torch

from qpeft_ext.prefixes.kv import LayerKV, Packing, PrefixKV


def test_split_and_collate_lose_nothing():
    keys = torch.randn(3, 2, 6, 4)
    batch = PrefixKV([LayerKV(keys, keys + 1, None), None, LayerKV(keys[:, :, -3:], keys[:, :, -3:], 4)], [6, 2, 4])
    alone = batch.split()
    again = PrefixKV.collate(alone)
    for i, length in enumerate(batch.lengths):
        assert alone[i].flat.numel() == Packing.of(batch).numel(length)
        for kv, expected in ((again.layers[0], batch.layers[0]), (again.layers[2], batch.layers[2])):
            kept = min(length, kv.keys.shape[2])
            assert torch.equal(kv.keys[i, :, -kept:], expected.keys[i, :, -kept:])
            assert not kv.values[i, :, : kv.values.shape[2] - kept].any()
