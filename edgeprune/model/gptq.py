"""The checkpoint of a model in the layout of GPTQ's first version, as AutoGPTQ, vLLM and transformers read it.

Of a linear layer: `qweight` int32 (in / p, out), p codes of `bits` bits in a word, the first in the lowest bits, each
more by 2^(bits - 1) than ours; `scales` fp16 (groups, out); `qzeros` int32 (groups, out / p), the code of 0.0 less one;
`g_idx` int32 (in,), the group of each input. The layout has one format for all layers, and tables in floats. It does
not know how the codes were chosen.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.configuration import checkpoint_tensors, loadable, read_config
from edgeprune.model.checkpoint.safetensors_file import Packing
from edgeprune.model.decoder import Decoder
from edgeprune.model.model import Model
from edgeprune.model.save import save_checkpoint
from edgeprune.precision import WEIGHT_FORMATS, WeightFormat

if TYPE_CHECKING:
    import torch

    from edgeprune.model.quantised import QuantisedWeight

WORD = 32  # bits
FORMATS = tuple(
    name
    for name, form in WEIGHT_FORMATS.items()
    if form.storage == "packed" and not form.offset and not form.activation_bits
)
OTHERWISE = "Deploy the checkpoint, the ONNX graph or a GGUF file."


def check_gptq(decoder: Decoder, by_layer: bool = False) -> None:
    """Raises InputError for a model whose layers the layout cannot hold, whatever their format.

    by_layer: they will differ in width.
    """
    if decoder.picture is not None:
        raise InputError(f"GPTQ checkpoints hold language models, {decoder.family} makes pictures", OTHERWISE)
    if by_layer or not decoder.is_uniform or None in (decoder.layers[0].attention, decoder.layers[0].mlp):
        raise InputError("a GPTQ checkpoint cannot hold layers of different widths", "Use --layout uniform.")
    if decoder.layers[0].mlp.experts is not None:
        raise InputError(f"GPTQ checkpoints of experts, as {decoder.family} has them, are not written", OTHERWISE)
    if any(tensor.place.transposed for tensor in checkpoint_tensors(decoder).values()):
        raise InputError(f"GPTQ has no layout for {decoder.family}, whose matrices are transposed", OTHERWISE)


def gptq_format(decoder: Decoder) -> WeightFormat:
    """Returns the one format of all layers. Raises InputError where there is none that the layout has."""
    modules = {
        f"{kind} of layer {index}": module.weight_format
        for index, layer in enumerate(decoder.layers)
        for kind, module in (("attention", layer.attention), ("MLP", layer.mlp))
    }
    remedy = f"Give one of them: --weights {'|'.join(FORMATS)}."
    first, *others = modules.items()
    for module, weight_format in (first, *others):
        named = weight_format.name if weight_format else "float"
        if named not in FORMATS:
            raise InputError(f"a GPTQ checkpoint has no format {named}, which the {module} is in", remedy)
        if weight_format != first[1]:
            different = f"the {first[0]} is in {first[1].name}, the {module} in {named}"
            raise InputError(f"a GPTQ checkpoint has one format for all layers, but {different}", remedy)
    return first[1]


def export_gptq(model: Model, folder: Path) -> None:
    """Writes a model of uniform layers in one format into a new folder, floats in fp16; one layer is in memory at a
    time.

    Raises InputError for a model that the layout cannot hold, and NumericalError for a float beyond fp16.
    """
    import torch

    # One format, and widths that fill whole words.
    check_gptq(model.decoder)
    weight_format = gptq_format(model.decoder)
    decoder = replace(model.decoder, embedding_format=None, head_format=None)
    formats, per_word = decoder.weight_formats, WORD // weight_format.bits
    for key, tensor in checkpoint_tensors(loadable(decoder, read_config(model.directory))).items():
        if tensor.names[0] in formats and any(size % per_word for size in tensor.shape):
            shape = "x".join(map(str, tensor.shape))
            raise InputError(f"{key} of {shape} does not fill words of {per_word} codes, as GPTQ asks", OTHERWISE)
    # Tables and all else in floats.
    config = _config(weight_format)
    tensors = ((name, (model.quantised if name in formats else model.weights)[name]) for name in decoder.shapes())
    save_checkpoint(decoder, tensors, model, folder, dtype=torch.float16, packing=Packing(config, pack))
    # The file that AutoGPTQ reads in place of the configuration's field.
    text = json.dumps(config | {"model_file_base_name": "model"}, indent=2, sort_keys=True) + "\n"
    (folder / "quantize_config.json").write_text(text, encoding="utf-8")


def _config(weight_format: WeightFormat) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": weight_format.bits,
        "group_size": weight_format.group or -1,
        "sym": True,
        "desc_act": False,
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": 0.01,
        "lm_head": False,
    }


def pack(weight: QuantisedWeight) -> dict[str, torch.Tensor]:
    """Returns the four tensors of a weight (out_features, in_features) of a symmetric format."""
    import torch

    bits, middle = weight.form.bits, 2 ** (weight.form.bits - 1)
    groups = weight.scales.shape[1]
    zeros = torch.full_like(weight.scales, middle - 1, dtype=torch.int32)  # (out, groups)
    return {
        "qweight": _words(weight.codes.int() + middle, bits).T.contiguous(),
        "qzeros": _words(zeros.T, bits),
        "scales": weight.scales.half().T.contiguous(),
        "g_idx": torch.arange(groups, dtype=torch.int32).repeat_interleave(weight.shape[1] // groups),
    }


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns codes int32 (rows, n) from 0 on in words int32 (rows, n * bits / 32), the first in the lowest bits."""
    import torch

    parts = codes.unflatten(1, (-1, WORD // bits))  # (rows, words, codes of a word)
    words = torch.zeros_like(parts[..., 0])
    for index in range(WORD // bits):
        words |= parts[..., index] << (bits * index)
    return words
