"""The tensors of a weight of few bits in a file, as compressed-tensors has them.

Of whole numbers, `pack-quantized`:
    weight_shape       int64 (2,): rows, columns
    weight_packed      int32 (rows, columns * bits / 32): codes + 2 ** (bits - 1), the first in the lowest bits
    weight_zero_point  int32 (rows * bits / 32, groups): the zeros of an asymmetric format, packed along the rows
    weight_scale       (rows, groups), in a float type
    input_scale        (1,), in a float type, of a format that rounds what the layer reads

Of floats of 8 bits, `float-quantized`, with the same two scales:
    weight             float8_e4m3fn (rows, columns)

Of floats of 4 bits, `nvfp4-pack-quantized`:
    weight_global_scale, input_global_scale  fp32 (1,): what the scales were multiplied by, 1 over the units
    weight_packed      uint8 (rows, columns / 2): the first code in the lower bits
    weight_scale       float8_e4m3fn (rows, groups)

The longest numbers come first, so that mapped files are read where they are aligned. A row of codes begins with a word
of its own: whatever is done to rows can be done to packed ones. It knows neither configurations nor files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edgeprune.model.checkpoint.places import StoredTensor

if TYPE_CHECKING:
    import torch

    from edgeprune.model.quantised import QuantisedWeight

SHAPE, PACKED, ZEROS, SCALE = "weight_shape", "weight_packed", "weight_zero_point", "weight_scale"
INPUT_SCALE = "input_scale"
FLOATS, UNIT, INPUT_UNIT = "weight", "weight_global_scale", "input_global_scale"
WORD_BITS = 32


def packed_parts(weight: QuantisedWeight, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns the tensors of a weight, by the names that stand in place of `weight`; scale_dtype: of float scales."""
    import torch

    if weight.form.e4m3_scales:
        units = {UNIT: weight.scale_unit, INPUT_UNIT: weight.input_scale}
        parts = {name: (1.0 / unit).float().reshape(1) for name, unit in units.items()}
        codes = weight.codes.view(torch.uint8)
        parts[PACKED] = (codes[:, 1::2] << 4).add_(codes[:, ::2])
        return parts | {SCALE: weight.scale_codes.view(torch.float8_e4m3fn)}
    if weight.form.levels == "e4m3":
        scales = {SCALE: weight.scales.to(scale_dtype), INPUT_SCALE: weight.input_scale.to(scale_dtype).reshape(1)}
        return scales | {FLOATS: weight.codes.view(torch.float8_e4m3fn)}
    bits = weight.form.bits
    parts = {SHAPE: torch.tensor(tuple(weight.shape)), PACKED: pack(weight.codes, bits)}
    if weight.zeros is not None:
        parts[ZEROS] = pack(weight.zeros.t(), bits).t()
    parts[SCALE] = weight.scales.to(scale_dtype)
    if weight.input_scale is not None:
        parts[INPUT_SCALE] = weight.input_scale.to(scale_dtype).reshape(1)
    return parts


def unpacked(tensor: StoredTensor, part: Callable[[str], torch.Tensor], name: str) -> QuantisedWeight:
    """Returns one of the weights of a tensor. part: reads the tensor in the file that has a name in place of
    `weight`.
    """
    import torch

    from edgeprune.model.quantised import QuantisedWeight

    form, (rows, columns) = tensor.form, tensor.shape
    if form.e4m3_scales:
        unit, input_unit = (1.0 / part(name_of_unit).float().reshape(()) for name_of_unit in (UNIT, INPUT_UNIT))
        pairs = tensor.rows_of(part(PACKED), name)  # (rows, columns / 2)
        codes = torch.stack([pairs & 15, pairs >> 4], dim=2).flatten(1).view(torch.int8)
        scales = tensor.rows_of(part(SCALE).float(), name).contiguous() * unit
        return QuantisedWeight(form, codes, scales, input_scale=input_unit, scale_unit=unit)
    scales = tensor.read(part(SCALE).float(), name)
    input_scale = part(INPUT_SCALE).float().reshape(()) if form.activation_bits else None
    if form.levels == "e4m3":
        codes = tensor.rows_of(part(FLOATS).view(torch.int8), name).contiguous()
        return QuantisedWeight(form, codes, scales, input_scale=input_scale)
    # Rows first, so that no more than this weight is unpacked.
    codes = unpack(tensor.rows_of(part(PACKED), name), form.bits, columns)
    # Zeros are packed along the rows.
    zeros = None
    if form.offset:
        stored_zeros = unpack(part(ZEROS).t(), form.bits, rows).t()  # (rows, groups)
        zeros = tensor.rows_of(stored_zeros, name).contiguous()
    return QuantisedWeight(form, codes, scales, zeros, input_scale)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns codes (rows, columns) int8 of 4 or 8 bits as int32 (rows, words), the last word filled up with zeros."""
    import torch

    per_word = WORD_BITS // bits
    # In place, because torch imports its compiler for the others' results on the device `meta`.
    values = codes.view(torch.uint8).clone().add_(2 ** (bits - 1))  # modulo 256
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % per_word))
    if bits == 4:
        values = (values[:, 1::2] << 4).add_(values[:, ::2])  # (rows, bytes)
    return values.flatten().view(torch.int32).unflatten(0, (len(codes), -1))


def unpack(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Returns the codes (rows, columns) int8 of 4 or 8 bits that `pack` has made words of."""
    import torch

    return (fields(words, bits, columns).short() - 2 ** (bits - 1)).to(torch.int8)


def fields(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Returns what stands in words (rows, n) int32: (rows, columns) uint8 of 2, 3, 4 or 8 bits, the first lowest."""
    import torch

    values = words.contiguous().flatten().view(torch.uint8).unflatten(0, (len(words), -1))  # (rows, bytes)
    if bits == 3:  # eight of them in three bytes
        values = torch.nn.functional.pad(values, (0, -values.shape[1] % 3)).unflatten(1, (-1, 3)).int()
        values = values[..., 0] | values[..., 1] << 8 | values[..., 2] << 16
    shifts = range(0, 24 if bits == 3 else 8, bits)
    parts = torch.stack([values >> shift & 2**bits - 1 for shift in shifts], dim=2)
    return parts.flatten(1)[:, :columns].to(torch.uint8)
