"""Random checkpoints that a GGUF file can hold, whole, narrower, and with fewer layers."""

from dataclasses import replace
from pathlib import Path

import torch

from edgeprune.model.load import load_model
from edgeprune.model.save import save_checkpoint
from tests.support.families import CASES, random_model
from tests.support.llamacpp import VOCABULARY, save_merging_tokenizer

LONGROPE = "phi3, longrope, partial rotary, sliding window"


CHANGES = {
    "qwen2": {"num_attention_heads": 4},
    "olmo2": {"num_attention_heads": 4},
    "exaone4": {"num_attention_heads": 4},
    "starcoder2": {"num_attention_heads": 4},
    "olmo3": {"num_attention_heads": 4, "num_hidden_layers": 4, "layer_types": None},  # llama.cpp has no other pattern
    "smollm3": {"no_rope_layer_interval": 4, "num_hidden_layers": 5},
    # llama.cpp gives a context 256 places at least, and takes the long factors beyond the original context
    LONGROPE: {
        "original_max_position_embeddings": 256,
        "max_position_embeddings": 512,
        "rope_parameters": CASES[LONGROPE]["rope_parameters"] | {"original_max_position_embeddings": 256},
    },
    "llama, linear rope": {"dtype": torch.float16},
    "gemma3_text": {"dtype": torch.bfloat16},
}


def saved(folder: Path, case: str, **changes):
    """The random model of a case, with a tokenizer that has merges."""
    changes = CHANGES.get(case, {}) | changes
    dtype = changes.pop("dtype", torch.float32)
    random_model(case, vocab_size=len(VOCABULARY), **changes).to(dtype).save_pretrained(folder)
    save_merging_tokenizer(folder)
    return load_model(str(folder))


def narrowed(model, folder: Path, widths):
    """The first heads and channels alone."""
    target = model.decoder.with_widths(*widths)
    tensors = ((name, model.weights[name][tuple(map(slice, shape))]) for name, shape in target.shapes().items())
    save_checkpoint(target, tensors, model, folder)
    return load_model(str(folder))


def without_layers(model, folder: Path, kept: list[int]):
    layers = tuple(model.decoder.layers[index] for index in kept)
    target = replace(model.decoder, layers=layers)
    source = {f"layers.{new}.": f"layers.{old}." for new, old in enumerate(kept)}

    def stream():
        for name in target.shapes():
            prefix = next((p for p in source if name.startswith(p)), "")
            yield name, model.weights[source.get(prefix, "") + name.removeprefix(prefix)]

    save_checkpoint(target, stream(), model, folder)
    return load_model(str(folder))
