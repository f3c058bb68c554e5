"""Low-rank updates of stored weights, in rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 512
"""Rows that are added at a time, so that a copy of a large weight in float64 is never in memory."""


@dataclass(frozen=True)
class LowRankUpdate:
    r"""An update of a weight, :math:`W + B A`.

    Attributes:
        down: A (rank, in), or (rank, in, k, k) for a convolution, float32.
        up: B (out, rank) with all scales, float32.
        dtype: Dtype of the updated weight.
    """

    down: Tensor
    up: Tensor
    dtype: torch.dtype

    def added_to(self, rows: Tensor, start: int = 0) -> Tensor:
        """Rows of W + B A in `dtype`, added in float32; the result does not depend on how the rows are divided.

        Args:
            rows: Rows of W, in any dtype.
            start: Index of the first row.
        """
        # In float32 the last bit of a product depends on its number of rows; a sum in float64 rounds to the same float32.
        down = self.down.flatten(1).double()
        added = rows.to(torch.float32, copy=True)
        for i in range(0, len(rows), CHUNK):
            up = self.up[start + i : start + min(i + CHUNK, len(rows))].double()
            chunk = added[i : i + CHUNK]
            chunk += (up @ down).float().view_as(chunk)
        return added.to(self.dtype)
