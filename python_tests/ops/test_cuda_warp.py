"""The replica's warps: instructions by the PTX manual, late copies, and misuse that must be noticed."""

import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fragments_are_a_matrix_product(replica, dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    truth = (c.double() + a.double() @ b.double()).float()
    replica.warp_product(a, b, c, True)
    torch.testing.assert_close(c, truth, rtol=1e-6, atol=1e-5)


def test_a_copy_that_nobody_waited_for_is_seen(replica):
    c = torch.zeros(16, 8)
    replica.warp_product(torch.ones(16, 16).half(), torch.ones(16, 8).half(), c, False)
    assert c.isnan().any()


@pytest.mark.parametrize(
    ("what", "words"),
    [(1, "at different calls"), (2, "wait for the others"), (3, "at a barrier"), (4, "past its shared memory")],
)
def test_misuse_is_an_error(replica, what, words):
    out = torch.zeros(32)
    for case in (what, 0):  # what failed must not spoil the next launch
        if case:
            with pytest.raises(RuntimeError, match=words):
                replica.warp_misuse(case, out)
        else:
            replica.warp_misuse(case, out)
    assert out.isnan().all()  # unwritten shared memory, also where an earlier block wrote
