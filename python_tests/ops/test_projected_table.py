import pytest
import torch
from inputs import poisoned
from test_clue_attention import make_inputs

from qpeft_ext.ops import ProjectedTable, clue_attention


def attend(projected, x, weights, H=4):
    w_q, _, _, w_o, b_q, _, _, b_o = weights
    documents = (x.query_embeds, x.query_mask, x.document_ids, x.document_mask, x.query_index)
    return projected.attend(*documents, w_q, w_o, b_q, b_o, num_heads=H)


def make_projected(x, weights, budget_bytes=1 << 20):
    return ProjectedTable(x.table, weights[1], weights[2], weights[5], weights[6], budget_bytes=budget_bytes)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("rows", [0, 20, 29])  # nothing fits: clue_attention; some queries fit in turn; all
def test_equals_clue_attention(rows, dtype, tolerance, device):
    first, weights = make_inputs(dtype=dtype, device=device)
    row_bytes = make_projected(first, weights).row_bytes
    projected = make_projected(first, weights, budget_bytes=rows * row_bytes)
    for seed in (0, 1, 2):  # later calls find rows of earlier ones
        x, _ = make_inputs(dtype=dtype, device=device, seed=seed, S=9)
        x = x._replace(table=first.table)
        truth = clue_attention(*x, *weights, num_heads=4)
        torch.testing.assert_close(attend(projected, x, weights), truth, rtol=tolerance, atol=tolerance)
        assert projected.used_bytes <= rows * row_bytes
    all_or_nothing = device.type == "cuda"
    assert (projected.used == 0) == (rows < 29 if all_or_nothing else rows == 0)


def test_masked_tokens_do_not_matter(device):
    x, weights = make_inputs(device=device)
    clean, noisy = (attend(make_projected(x, weights), y, weights) for y in (x, poisoned(x)))
    assert torch.equal(clean, noisy)


def test_projects_each_row_once(device):
    x, weights = make_inputs(device=device)
    projected = make_projected(x, weights)
    attend(projected, x, weights)
    used = projected.used
    distinct = x.document_ids[x.document_mask].unique().numel()
    assert used == (len(x.table) if device.type == "cuda" else distinct)
    attend(projected, x, weights)
    assert projected.used == used


def test_rows_without_numbers(device):
    x, weights = make_inputs(D=0, device=device)
    assert attend(make_projected(x, weights), x, weights, H=1).shape == (*x.query_index.shape, x.query_mask.shape[1], 0)


def test_impossible_inputs_are_the_errors_of_clue_attention(device):
    x, weights = make_inputs(device=device)
    projected = make_projected(x, weights)
    for H in (0, 3, -4):
        with pytest.raises(ValueError, match="num_heads must divide D = 16"):
            attend(projected, x, weights, H=H)
    for name, wrong in [("document_ids", x.document_ids.int()), ("query_index", x.query_index.int())]:
        with pytest.raises(TypeError, match=f"{name} must be int64, got int32"):
            attend(projected, x._replace(**{name: wrong}), weights)
    with pytest.raises(ValueError, match="query_mask must have shape"):
        attend(projected, x._replace(query_mask=x.query_mask[:, 1:]), weights)
