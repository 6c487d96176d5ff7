"""Peak memory of pruning a model that is larger than the limit: random Llamas of 1.1 B and 2.1 B parameters.

    python tools/bench_memory.py [--layers 22,44] [--samples 16]

Each is written to disk in bf16 (2.2 and 4.2 GB), pruned to 70 % by layers in a fresh process and written
again. The peak is that of the resident set; limit 2 GB, and it must not grow with the depth. Samples are of
512 tokens; those that a model generates itself count like any others.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
WIDTHS = (4, 6, 3968)
LENGTH = 512


def write_checkpoint(folder: Path, layers: int) -> None:
    """Random weights of the usual scale, one shard for each layer, so that the writer stays small as well."""
    import torch
    from safetensors.torch import save_file

    from edgeprune.model.families import checkpoint_names, decoder_of
    from edgeprune.model.load import load_model

    config = SHAPE | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(load_model("demo").directory / name, folder)
    decoder = decoder_of(config)
    names, generator = checkpoint_names(decoder), torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in decoder.shapes().items():
        shards.setdefault(".".join(name.split(".")[:2]), {})[name] = shape
    places = {}
    for number, shapes in enumerate(shards.values()):
        file = f"model-{number:05}.safetensors"
        tensors = {}
        for name, shape in shapes.items():
            values = torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)
            tensors[names[name]] = values.bfloat16()
            places[names[name]] = file
        save_file(tensors, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def prune_in_this_process(folder: Path, samples: int) -> None:
    """The child: prunes, writes, and says its peak and its seconds."""
    import torch

    from edgeprune.engine.facts import peak_bytes
    from edgeprune.model.load import load_model
    from edgeprune.model.save import save_checkpoint
    from edgeprune.pruning.methods import DEFAULT, METHODS
    from edgeprune.pruning.prune import prune

    model = load_model(str(folder / "dense"))
    ids = torch.randint(0, model.decoder.vocab_size, (samples, LENGTH), generator=torch.Generator().manual_seed(0))
    target = model.decoder.with_widths(*WIDTHS)
    start = time.monotonic()
    save_checkpoint(target, prune(model, target, ids, METHODS[DEFAULT], 0), model, folder / "pruned")
    print(json.dumps({"peak": peak_bytes(), "seconds": time.monotonic() - start}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="22,44")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        prune_in_this_process(arguments.child, arguments.samples)
        return
    for layers in map(int, arguments.layers.split(",")):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "dense").mkdir()
            write_checkpoint(folder / "dense", layers)
            size = sum(file.stat().st_size for file in (folder / "dense").glob("*.safetensors"))
            words = [sys.executable, __file__, "--child", str(folder), "--samples", str(arguments.samples)]
            result = subprocess.run(words, capture_output=True, text=True, check=True)
            found = json.loads(result.stdout.splitlines()[-1])
            print(
                f"{layers} layers, {size / 1e9:.2f} GB on disk: peak {found['peak'] / 1e9:.2f} GB, limit 2.00 GB; "
                f"{found['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
