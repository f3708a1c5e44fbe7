"""What follows the last attention, on the rows that are read only.

The head reads the rows before query tokens, 16 of the 40 of a usual suffix. What an LM runs after it has stored the
keys of its last layer (output projection, feed-forward) makes each row from that row alone; the others are left out.
So are the last layer's queries, where they have a projection of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..ops.hardware import few_heights, shape_step
from .lock import in_this_thread


class RowWiseModules:
    """Modules that read one tensor [B, L, n] or [B·L, n] and treat every row by itself."""

    def __init__(self, modules: Sequence[nn.Module] = ()) -> None:
        self.modules = list(modules)

    def without(self, parts: Sequence[nn.Module]) -> RowWiseModules:
        """Those that have none of ``parts`` inside."""
        unwanted = set(parts)
        return RowWiseModules([module for module in self.modules if unwanted.isdisjoint(module.modules())])

    @contextmanager
    def only(self, rows: Tensor, shape: tuple[int, int]) -> Iterator[None]:
        """While this is entered, the modules compute ``rows`` in this thread; the others come out as zeros.

        rows: flat indices into [B·L], int64 [N], each once.  shape: (B, L).
        """
        filled_up = torch.cat([rows, rows[-1:].expand(few_heights(len(rows)) - len(rows))])

        def pick(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            x = inputs[0]
            some = rows if shape_step(x.device, x.dtype) == 1 else filled_up  # few shapes, where each takes time
            picked = x.reshape(-1, x.shape[-1]).index_select(0, some.to(x.device))
            return (picked.view(*(1,) * (x.dim() - 2), *picked.shape),)

        def put_back(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            width = output.shape[-1]
            whole = output.new_zeros(shape[0] * shape[1], width)
            whole = whole.index_copy(0, rows.to(output.device), output.reshape(-1, width)[: len(rows)])
            return whole.view(*shape, width) if inputs[0].dim() == 3 else whole

        handles = []
        try:
            for module in self.modules:
                handles.append(module.register_forward_pre_hook(in_this_thread(pick)))
                handles.append(module.register_forward_hook(in_this_thread(put_back)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def find_row_wise(decoder: nn.Module, run: Callable[[], object], after: Callable[[], bool]) -> RowWiseModules:
    """The outermost modules with matrices that ``decoder`` enters, in ``run()``, when ``after()`` is true; and the
    query projection beside one of them.

    Only those that take one tensor and return one with as many rows. That they treat rows by themselves is not known
    yet: compare a pass with and without them.
    """
    found: list[nn.Module] = []
    inside: list[nn.Module] = []

    def enter(module: nn.Module, inputs: tuple, named: dict) -> None:
        if after() and not inside and any(parameter.dim() > 1 for parameter in module.parameters()):
            inside.append(module)

    def leave(module: nn.Module, inputs: tuple, named: dict, output: object) -> None:
        if inside and inside[-1] is module:
            inside.pop()
            one = len(inputs) == 1 and not named and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)
            if one and inputs[0].dim() in (2, 3) and inputs[0].shape[:-1] == output.shape[:-1]:
                found.append(module)

    modules = dict(decoder.named_modules())
    handles = []
    try:
        for module in modules.values():
            handles.append(module.register_forward_pre_hook(in_this_thread(enter), with_kwargs=True))
            handles.append(module.register_forward_hook(in_this_thread(leave), with_kwargs=True))
        run()
    finally:
        for handle in handles:
            handle.remove()
    names = [name.rpartition(".")[0] + ".q_proj" for name, module in modules.items() if module in found]
    return RowWiseModules([*found, *(modules[name] for name in dict.fromkeys(names) if name in modules)])
