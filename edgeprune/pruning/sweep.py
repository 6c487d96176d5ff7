"""The scale of a group of weights that rounding to nearest loses least with, exactly.

As the scale falls, the levels of the weights grow one by one: the weight x takes level k at the scale |x| / (k - 1/2).
Between two such scales no level changes, and the least squares of the weights on their levels q, with importances h,
leave sum h x^2 - (sum h |x| q)^2 / sum h q^2: both sums grow by one term at each change. So the best of all scales is
found by one sort and two running sums; at the scale that it gives, the nearest levels lose no more.
"""

from __future__ import annotations

import numpy as np
import torch


def best_scales(
    values: torch.Tensor, importance: torch.Tensor, below: torch.Tensor, above: torch.Tensor
) -> torch.Tensor:
    """Returns the scales (out, groups) that lose least; zeros where no weight gets a level but zero.

    values: (places, out, groups) fp32; importance: in a shape that meets theirs; below, above: (out, groups), the
    levels that there are on each side of zero, whole numbers. Memory: a few times values times the levels.
    """
    sizes = values.abs()
    most = int(torch.maximum(below.max(), above.max()))
    levels = torch.arange(1, most + 1, dtype=values.dtype)[:, None, None, None]
    exists = (levels <= torch.where(values > 0, above, below)).float()  # (levels, places, out, groups)

    def by_group(changes: torch.Tensor) -> torch.Tensor:
        return (changes * exists).flatten(0, 1).movedim(0, 2).contiguous()  # (out, groups, levels * places)

    # numpy sorts several at once; what does not exist comes last, and changes nothing.
    order = torch.from_numpy(np.argsort(by_group(-sizes / (levels - 0.5)).numpy(), axis=2))
    products = by_group(sizes * importance).gather(2, order).cumsum(dim=2)
    squares = by_group((2 * levels - 1) * importance).gather(2, order).cumsum(dim=2)
    best = (products.square() / squares).nan_to_num_(nan=0.0).argmax(dim=2, keepdim=True)
    return (products.gather(2, best) / squares.gather(2, best)).squeeze(2).nan_to_num_(nan=0.0)
