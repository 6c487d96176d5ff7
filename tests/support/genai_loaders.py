"""Weights of few bits as onnxruntime-genai reads them for its own operator."""

from __future__ import annotations

import contextlib
import io
import json
from importlib import import_module
from pathlib import Path

import torch

CLASSES = {"gptq": "GPTQModel", "awq": "AWQModel"}


def unpacked(folder: Path, decoder) -> dict[str, torch.Tensor]:
    """The layers' matrices as onnxruntime-genai reads them, by the names of their modules: it unpacks and repacks codes
    and zeros for its own operator, (out, blocks, bytes of a block) from low bits to high ones."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    method = config["quant_method"]
    loader = getattr(import_module(f"onnxruntime_genai.models.loaders.{method}"), CLASSES[method])
    attention, mlp = decoder.layers[0].attention, decoder.layers[0].mlp
    sizes = (attention.query_size, attention.key_value_size, mlp.intermediate_size, len(decoder.layers))
    with contextlib.redirect_stdout(io.StringIO()):
        model = loader(method, str(folder), {"config": config, "use_g_idx": False}, *sizes)
    values = {}
    for layer in model.layers:
        for kind in ("self_attn", "mlp"):
            for name, module in vars(getattr(layer, kind)).items():
                if getattr(module, "qweight", None) is not None:
                    values[f"model.layers.{layer.layer_id}.{kind}.{name}"] = _values(module)
    return values


def _values(module) -> torch.Tensor:
    outputs, blocks, _ = module.qweight.shape
    codes, zeros = (_by_bits(packed, module.bits) for packed in (module.qweight, module.qzeros.reshape(outputs, -1)))
    scales = module.scales.reshape(outputs, blocks).float()
    return ((codes.float() - zeros[:, :blocks, None]) * scales[..., None]).flatten(1)


def _by_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    shifts = torch.arange(0, 8, bits)
    return (packed.int()[..., None] >> shifts & 2**bits - 1).flatten(-2)
