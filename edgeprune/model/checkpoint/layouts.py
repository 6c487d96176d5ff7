"""The layouts in which other programs store a matrix of few bits: their tensors, and the floats that these stand for.

    Scaled   weight F8_E4M3 or I8 (out, in); scales and zeros (blocks of out, blocks of in)
    Packed   weight_packed I32 (out, words of in), weight_zero_point I32 (words of out, groups), as packed.py has them
    Gptq     qweight I32 (words of in, out), qzeros I32 (groups, words of out), scales (groups, out)
    Awq      qweight I32 (in, words of out), qzeros I32 (groups, words of out), scales (groups, out)
    Mxfp4    _blocks U8 (experts, out, groups, 16), _scales U8 (experts, out, groups), of all experts of a layer

The floats are (code - zero) * scale in fp32, where the product of a short code and a scale of 16 bits is exact; readers
that compute in 16 bits round it. It knows neither configurations nor files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Protocol

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.packed import PACKED, SCALE, SHAPE, WORD_BITS, ZEROS, fields
from edgeprune.model.checkpoint.places import Shape

if TYPE_CHECKING:
    import torch

FLOATS = ("F32", "F16", "BF16")
NUMBERS = ("I32", "I64")  # as which sizes and the numbers of groups are stored
FLOAT8 = "F8_E4M3"
ORDER = "weight_g_idx"
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # of a word's codes: where that of each of eight outputs stands
E2M1 = [sign * number for sign in (1.0, -1.0) for number in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]  # by code
ALL = 0  # rows or columns of a block: as many as there are

Block = tuple[int, int]  # the rows and columns that have a scale in common
Part = tuple[tuple[str, ...], tuple[Shape, ...]]  # the types and the shapes that a tensor may have


class Layout(Protocol):
    """The tensors of a matrix (out, in), by the names that stand in place of `weight`."""

    @property
    def bits(self) -> int:
        """Returns the bits of a code."""

    @property
    def block(self) -> Block:
        """Returns what has a scale in common."""

    @property
    def optional(self) -> str:
        """Returns the name of the tensor that need not be there, the group of each input; empty for none."""

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Returns all tensors of a matrix."""

    def values(self, parts: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        """Returns the matrix in fp32. Raises InputError where an input is of a group that there is not."""


@dataclass(frozen=True)
class Scaled:
    """`naive-quantized` and its kinds, and FP8 with block scales: each code is a number of the type `dtype`.

    ordered: whether the group of each input is stored; None: where it is there.
    """

    dtype: str
    scale: str
    block: Block
    asymmetric: bool = False
    ordered: bool | None = None
    bits: int = 8

    @property
    def optional(self) -> str:
        return ORDER if self.ordered is None else ""

    def parts(self, shape: Shape) -> dict[str, Part]:
        scales = _grid(shape, self.block)
        shapes = (scales, (1,), ()) if self.block == (ALL, ALL) else (scales,)
        zeros = {ZEROS: ((self.dtype,), shapes)} if self.asymmetric else {}
        return {"weight": ((self.dtype,), (shape,)), self.scale: (FLOATS, shapes)} | zeros | _order(shape, self.ordered)

    def values(self, parts: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        grid = _grid(shape, self.block)
        zeros = parts[ZEROS].float().reshape(grid) if self.asymmetric else None
        scales = parts[self.scale].float().reshape(grid)
        return _scaled(parts["weight"].float(), scales, zeros, self.block, parts.get(ORDER))


@dataclass(frozen=True)
class Packed:
    """compressed-tensors' `pack-quantized`. ordered: as above."""

    bits: int
    block: Block
    asymmetric: bool = False
    ordered: bool | None = None

    @property
    def optional(self) -> str:
        return ORDER if self.ordered is None else ""

    def parts(self, shape: Shape) -> dict[str, Part]:
        rows, columns = shape
        scales = _grid(shape, self.block)
        shapes = (scales, (1,), ()) if self.block == (ALL, ALL) else (scales,)
        zeros = {ZEROS: (("I32",), ((_words(rows, self.bits), scales[1]),))} if self.asymmetric else {}
        packed = {SHAPE: (NUMBERS, ((2,),)), PACKED: (("I32",), ((rows, _words(columns, self.bits)),))}
        return packed | zeros | {SCALE: (FLOATS, shapes)} | _order(shape, self.ordered)

    def values(self, parts: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        middle, zeros = 2 ** (self.bits - 1), None
        codes = fields(parts[PACKED], self.bits, shape[1]).float()
        if self.asymmetric:
            zeros = fields(parts[ZEROS].t(), self.bits, shape[0]).t().float()  # (out, groups)
        else:
            codes -= middle
        scales = parts[SCALE].float().reshape(_grid(shape, self.block))
        return _scaled(codes, scales, zeros, self.block, parts.get(ORDER))


@dataclass(frozen=True)
class Gptq:
    """GPTQ's, in which all zeros are one less in the first version. ordered: the groups have to be stored."""

    bits: int
    block: Block  # of one row
    first_version: bool
    ordered: bool

    @property
    def optional(self) -> str:
        return "" if self.ordered else "g_idx"

    def parts(self, shape: Shape) -> dict[str, Part]:
        rows, columns = shape
        _, groups = _grid(shape, self.block)
        return {
            "qweight": (("I32",), ((_words(columns, self.bits), rows),)),
            "qzeros": (("I32",), ((groups, _words(rows, self.bits)),)),
            "scales": (FLOATS, ((groups, rows),)),
            "g_idx": (NUMBERS, ((columns,),)),
        }

    def values(self, parts: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        codes = fields(parts["qweight"].t(), self.bits, shape[1]).float()
        zeros = self._zeros(parts["qzeros"], shape[0]).t().float()  # (out, groups)
        return _scaled(codes, parts["scales"].t().float(), zeros, self.block, parts.get("g_idx"))

    def _zeros(self, words: torch.Tensor, outputs: int) -> torch.Tensor:
        """Returns the zeros (groups, out) uint8. One is added to whole words, as it was subtracted: a zero of 0 then
        comes back, which has borrowed from its neighbour. Fields of three bits straddle words and have none.
        """
        if not self.first_version:
            return fields(words, self.bits, outputs)
        if WORD_BITS % self.bits:
            return fields(words, self.bits, outputs) + 1 & 2**self.bits - 1
        ones = sum(1 << bit for bit in range(0, WORD_BITS, self.bits))
        return fields(words + ones, self.bits, outputs)


@dataclass(frozen=True)
class Mxfp4:
    """MXFP4 of stacked experts: numbers of E2M1, two in a byte, the first lowest, and a power of two for each group
    (OCP Microscaling Formats 1.0, 5.3)."""

    optional: str = ""
    bits: int = 4
    block: Block = (1, 32)

    def parts(self, shape: Shape) -> dict[str, Part]:
        experts, rows, columns = shape
        groups = ceil(columns / self.block[1])
        blocks = (experts, rows, groups, self.block[1] // 2)
        return {"_blocks": (("U8",), (blocks,)), "_scales": (("U8",), (blocks[:-1],))}

    def values(self, parts: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        """Returns the matrix of the one expert whose parts are given."""
        import torch

        pairs = parts["_blocks"]  # (out, groups, 16)
        codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(2)  # (out, groups, 32)
        exponents = parts["_scales"].int() - 127  # (out, groups)
        powers = torch.ldexp(torch.ones(exponents.shape), exponents)
        return (torch.tensor(E2M1)[codes.int()] * powers[..., None]).flatten(1)


@dataclass(frozen=True)
class Awq:
    """AWQ's, in the version `gemm`."""

    block: Block  # of one row
    optional: str = ""
    bits: int = 4

    def parts(self, shape: Shape) -> dict[str, Part]:
        rows, columns = shape
        _, groups = _grid(shape, self.block)
        return {
            "qweight": (("I32",), ((columns, _words(rows, 4)),)),
            "qzeros": (("I32",), ((groups, _words(rows, 4)),)),
            "scales": (FLOATS, ((groups, rows),)),
        }

    def values(self, parts: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        codes, zeros = (_outputs_in_order(parts[name], shape[0]).float() for name in ("qweight", "qzeros"))
        return _scaled(codes, parts["scales"].t().float(), zeros, self.block)


def _outputs_in_order(words: torch.Tensor, outputs: int) -> torch.Tensor:
    """Returns AWQ's words (n, words of out) as (out, n) uint8."""
    codes = fields(words, 4, 8 * words.shape[1]).unflatten(1, (-1, 8))  # (n, words, 8)
    return codes[..., AWQ_ORDER].flatten(1)[:, :outputs].t()


def _grid(shape: Shape, block: Block) -> Shape:
    """Returns the numbers of blocks along both sides, of which the last may not be whole."""
    return tuple(ceil(size / (per_block or size)) for size, per_block in zip(shape, block, strict=True))


def _words(values: int, bits: int) -> int:
    return ceil(values * bits / WORD_BITS)


def _order(shape: Shape, ordered: bool | None) -> dict[str, Part]:
    return {} if ordered is False else {ORDER: (NUMBERS, ((shape[1],),))}


def _scaled(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    block: Block,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns (codes - zeros) * scales; codes: (out, in) fp32; scales, zeros: as `_grid` has them, fp32.

    order: the group of each input; groups of inputs as they come where it is missing, or was never set (-1).
    """
    import torch

    rows, columns = codes.shape
    if order is None or (order == -1).any():
        order = torch.arange(columns) // (block[1] or columns)
    order = order.long()
    if not 0 <= int(order.min()) <= int(order.max()) < scales.shape[1]:
        raise InputError(
            f"an input is of the group {int(order.max())} of {scales.shape[1]}",
            "The weights are damaged: fetch them again.",
        )
    blocks = torch.arange(rows) // (block[0] or rows)
    if zeros is not None:
        codes = codes - _spread(zeros, blocks, order)
    return codes * _spread(scales, blocks, order)


def _spread(values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Returns values (blocks of out, blocks of in) as (out, in), or (out, 1) where all columns have the same."""
    values = values if len(values) == len(rows) else values[rows]
    return values if values.shape[1] == 1 else values[:, columns]
