"""The real quantiser of ggml, out of the library that the package xllamacpp brings."""

from __future__ import annotations

import ctypes
import functools
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize


@functools.cache
def _quantiser() -> ctypes._CFuncPtr:
    library = ctypes.CDLL(str(next(Path(find_spec("xllamacpp").origin).parent.glob("*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library.ggml_quantize_chunk


def rounded_by_ggml(weight: torch.Tensor, importance: torch.Tensor, name: str) -> torch.Tensor:
    """What llama.cpp makes of a weight (out, in) fp32 in a type of ggml, with the mean squares (in,) of its inputs."""
    kind = GGMLQuantizationType[name.upper()]
    size, width = GGML_QUANT_SIZES[kind]
    (rows, columns), weight = weight.shape, weight.numpy()
    blocks = np.empty((rows, columns // size * width), dtype=np.uint8)
    importance = np.ascontiguousarray(importance.numpy(), dtype=np.float32)
    written = _quantiser()(kind, weight.ctypes.data, blocks.ctypes.data, 0, rows, columns, importance.ctypes.data)
    assert written == blocks.nbytes
    return torch.from_numpy(dequantize(blocks, kind))
