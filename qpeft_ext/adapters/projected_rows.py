"""`ProjectedRows`: keys and values of Q-PEFT-A's table rows, kept between calls."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..lm.state import writes
from ..ops import ProjectedTable


class ProjectedRows:
    """Keys and values of the rows of the embedding table that were seen so far (`ops.ProjectedTable`).

    Belongs to one caller of a clue module (a `Reranker`), who gives it with every call without gradient. They are
    computed anew when the table or a weight of the module has changed.

    Args:
        max_bytes: budget for the rows; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._made_of: tuple | None = None
        self._table: ProjectedTable | None = None
        self._kept: list[Tensor] = []  # what the table is made of, so that no other tensor can take its address

    def __getstate__(self) -> dict:
        # the rows are known by addresses, which mean nothing in another process or for a copy of the module
        return self.__dict__ | {"_made_of": None, "_table": None, "_kept": []}

    @property
    def used_bytes(self) -> int:
        """Bytes that the rows take now."""
        return 0 if self._table is None else self._table.used_bytes

    def clear(self) -> None:
        """Forget the rows: results then depend on the following calls only, to the bit."""
        if self._table is not None:
            self._table.clear()

    def of(
        self,
        table: Tensor,
        parameters: Sequence[Tensor],
        weights: tuple[Tensor, Tensor],
        biases: tuple[Tensor | None, Tensor | None],
    ) -> ProjectedTable:
        """The rows of ``table`` that were projected so far.

        Args:
            table: E, [V, D].
            parameters: what weights and biases are computed from.
            weights, biases: those of keys and values, [D, D] and [D] or None, in the dtype of the table.
        """
        made_of = tuple((t.data_ptr(), writes(t), t.dtype) for t in (table, *parameters))
        if self._table is None or self._made_of != made_of:
            self._table = ProjectedTable(table, *weights, *biases, budget_bytes=self.max_bytes)
            self._made_of, self._kept = made_of, [t.detach() for t in (table, *parameters)]
        return self._table
