"""Checkpoints that other programs quantised, beside the floats that these read from them.

compressed-tensors and transformers' FP8 pack and unpack with their own code; GPTQ's and AWQ's packers need a GPU or
heavy packages, so that their words are made here, code by code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from edgeprune.model.checkpoint.configuration import checkpoint_tensors
from edgeprune.model.load import load_model

Parts = dict[str, torch.Tensor]  # by the names that stand in place of `weight`
Packed = tuple[Parts, torch.Tensor]  # and the matrix (out, in) fp32 that they stand for
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def arguments(bits: int, **more: Any) -> QuantizationArgs:
    return QuantizationArgs(num_bits=bits, **more)


def compressed(weight: torch.Tensor, form: str, args: QuantizationArgs, dtype: torch.dtype = torch.bfloat16) -> Packed:
    """By compressed-tensors, whose scales are stored in dtype."""
    rows, columns = weight.shape
    block = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, args.group_size),
        "block": args.block_structure,
    }[args.strategy]
    grid = [-(-size // per_block) for size, per_block in zip(weight.shape, block, strict=True)]
    padded = torch.nn.functional.pad(weight, (0, grid[1] * block[1] - columns, 0, grid[0] * block[0] - rows))
    blocks = padded.unflatten(1, (grid[1], -1)).unflatten(0, (grid[0], -1))
    scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
    if args.strategy == "tensor":
        scale, zero = scale.flatten(), zero.flatten()
    scheme, compressor = QuantizationScheme(targets=["Linear"], weights=args), BaseCompressor.load_from_registry(form)
    scale = scale.to(dtype).float()
    parts = compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, scheme)
    floats = compressor.decompress(parts, scheme)["weight"]
    return parts | {"weight_scale": scale.to(dtype)}, floats


def ordered(weight: torch.Tensor, args: QuantizationArgs) -> Packed:
    """As older versions of compressed-tensors store inputs whose groups are not in their order."""
    columns = weight.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    parts, floats = compressed(weight[:, order], "pack-quantized", args)
    codes = unpack_from_int32(parts["weight_packed"], args.num_bits, weight.shape)[:, order.argsort()]
    groups = torch.empty(columns, dtype=torch.int32)
    groups[order] = torch.arange(columns, dtype=torch.int32) // args.group_size
    parts |= {"weight_packed": pack_to_int32(codes, args.num_bits), "weight_g_idx": groups}
    return parts, floats[:, order.argsort()]


def compressed_config(groups: Mapping[str, tuple[list[str], QuantizationArgs]], form: str, **more: Any) -> dict:
    """compressed-tensors' field of config.json; groups: targets and arguments by name."""
    schemes = {name: QuantizationScheme(targets=targets, weights=args) for name, (targets, args) in groups.items()}
    config = QuantizationConfig(config_groups=schemes, format=form, quantization_status="compressed", **more)
    return config.model_dump(mode="json")


def fp8(weight: torch.Tensor, block: list[int] | None) -> Packed:
    """By transformers; a matrix that the blocks do not divide stays as it is."""
    quantizer = SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=block))
    parts = Fp8Quantize(quantizer).convert({"weight": weight})
    if "weight_scale_inv" not in parts:
        return parts, weight
    return parts, Fp8Dequantize(quantizer).convert(dict(parts))["weight"].float()


def _rounded(weight: torch.Tensor, bits: int, groups: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, ...]:
    """Codes (out, in), zeros and scales (out, groups) of a matrix whose inputs are of these groups."""
    count, most = int(groups.max()) + 1, 2**bits - 1
    spans = [weight[:, groups == group] for group in range(count)]
    low, high = (torch.stack([span(part, 1) for part in spans], 1) for span in (torch.amin, torch.amax))
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / most).half().float()
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if symmetric else (-low / scales).round().clamp(0, most)
    codes = (weight / scales[:, groups] + zeros[:, groups]).round().clamp(0, most)
    return codes, zeros, scales


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Each row of codes as one long number, the first code in its lowest bits, in words int32."""
    count = -(-codes.shape[1] * bits // 32)
    rows = [sum(int(code) << bits * place for place, code in enumerate(row)) for row in codes.tolist()]
    data = b"".join(row.to_bytes(4 * count, "little") for row in rows)
    return torch.frombuffer(bytearray(data), dtype=torch.int32).unflatten(0, (-1, count))


def gptq(
    weight: torch.Tensor, bits: int, group: int, version: int = 1, symmetric: bool = True, ordered: bool = False
) -> Packed:
    """GPTQ's layout, whose first version subtracts one from the zeros, word by word."""
    columns = weight.shape[1]
    groups = torch.arange(columns) // (columns if group == -1 else group)
    if ordered:
        groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
    codes, zeros, scales = _rounded(weight, bits, groups, symmetric)
    if version == 1 and 32 % bits:
        stored_zeros = _words(((zeros - 1) % 2**bits).t(), bits)
    else:
        ones = sum(1 << place for place in range(0, 32, bits))
        stored_zeros = _words(zeros.t(), bits) - (ones if version == 1 else 0)
    parts = {
        "qweight": _words(codes, bits).t().contiguous(),
        "qzeros": stored_zeros,
        "scales": scales.half().t().contiguous(),
        "g_idx": groups.int(),
    }
    return parts, (codes - zeros[:, groups]) * scales[:, groups]


def awq(weight: torch.Tensor, group: int) -> Packed:
    """AWQ's layout for the kernel of the version gemm."""
    columns = weight.shape[1]
    groups = torch.arange(columns) // (columns if group == -1 else group)
    codes, zeros, scales = _rounded(weight, 4, groups, symmetric=False)
    swapped = {"qweight": codes, "qzeros": zeros}
    parts = {
        name: _words(values.t().unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1), 4) for name, values in swapped.items()
    }
    return parts | {"scales": scales.half().t().contiguous()}, (codes - zeros[:, groups]) * scales[:, groups]


def requantised(
    source: Path, folder: Path, details: Mapping[str, Any], pack: Callable[[str, torch.Tensor], Packed | None]
) -> dict[str, torch.Tensor]:
    """The checkpoint of floats with each matrix as `pack` stores it, by its module's name; None: as it is.

    Returns what the weights then are, by the names of decoder.py.
    """
    shutil.copytree(source, folder)
    model, tensors = load_model(str(source)), load_file(source / "model.safetensors")
    expected = dict(model.weights)
    for key, tensor in checkpoint_tensors(model.decoder).items():
        if len(tensor.shape) != 2 or key not in tensors:
            continue
        turned = torch.t if tensor.place.transposed else torch.Tensor.contiguous
        packed = pack(key.removesuffix(".weight"), turned(tensors[key]).float())
        if packed is None:
            continue
        del tensors[key]
        parts, floats = packed
        tensors |= {key.removesuffix("weight") + name: part.contiguous() for name, part in parts.items()}
        expected |= {name: tensor.read(turned(floats).contiguous(), name) for name in tensor.names}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": details}))
    return expected
