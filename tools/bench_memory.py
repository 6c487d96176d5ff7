"""Peak memory of work on a model that is larger than the limit: random Llamas of 1.1 B and 2.1 B parameters, or 7 B.

    python tools/bench_memory.py [--shape 1b|7b] [--layers 22,44] [--work convert,prune,quantise,both]
        [--files safetensors,bin] [--samples 16]

Each is written to disk in bf16 (2.2 and 4.2 GB; 32 layers of 7b 13.5 GB) as shards of a layer. Convert: to ONNX graphs
in fp16, limit 1 GB, of 7b 3. Prune: to 70 % by layers; quantise: layers to int4-64, embedding and head to int8; both:
in one walk; each written again, limit 2 GB, of 7b 6. Each in a fresh process; the peak is that of the resident set, and
it must not grow with the depth. Samples are of 512 tokens; those that a model generates itself count like any others.
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

from edgeprune.ondevice.machine import peak_bytes

SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHAPES = {"1b": SHAPE, "7b": SHAPE | {"hidden_size": 4096, "intermediate_size": 11008, "num_key_value_heads": 32}}
WIDTHS = {"1b": (4, 6, 3968), "7b": (24, 1, 7552)}
FORMATS = ("int4-64", "int8")  # of the layers, of embedding and head
LENGTH = 512
SHARD_BYTES = 100 * 10**6
LIMITS = {  # GB
    "1b": {"convert": 1.0, "prune": 2.0, "quantise": 2.0, "both": 2.0},
    "7b": {"convert": 3.0, "prune": 6.0, "quantise": 6.0, "both": 6.0},
}


def write_checkpoint(folder: Path, layers: int, suffix: str, shape: str = "1b") -> None:
    """Writes random weights of the usual scale, in shards of about a layer, so that the writer stays small as well."""
    import torch

    from edgeprune.model.checkpoint import safetensors_file
    from edgeprune.model.checkpoint.configuration import decoder_of
    from edgeprune.model.load import demo_file, load_gguf

    config = SHAPES[shape] | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(load_gguf(demo_file(), "demo").directory / name, folder)
    decoder, generator = decoder_of(config), torch.Generator().manual_seed(0)
    weights = (
        (name, torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator))
        for name, shape in decoder.shapes().items()
    )
    safetensors_file.SHARD_BYTES = SHARD_BYTES
    safetensors_file.write_weights(decoder, weights, folder, torch.bfloat16)
    if suffix == "bin":
        _as_pickles(folder)


def _as_pickles(folder: Path) -> None:
    """Replaces the shards of safetensors by those that torch.save writes."""
    import torch
    from safetensors.torch import load_file

    for file in folder.glob("*.safetensors"):
        torch.save(load_file(file), file.with_name(file.stem.replace("model", "pytorch_model") + ".bin"))
        file.unlink()
    index = folder / "model.safetensors.index.json"
    text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
    (folder / "pytorch_model.bin.index.json").write_text(text)
    index.unlink()


def convert_in_this_process(folder: Path) -> None:
    """Writes the graphs of every dialect over one data file, and prints the peak and the seconds; run in a child."""
    from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
    from edgeprune.model.load import load_model

    start = time.monotonic()
    model = load_model(str(folder / "dense"))
    variants = [GraphVariant("onnxruntime", "all"), GraphVariant("opset23", "all"), GraphVariant("primitive", "all")]
    write_graphs(model.decoder, model.weights, folder / "onnx", "fp16", variants)
    print(json.dumps({"peak": peak_bytes(), "seconds": time.monotonic() - start}))


def walk_in_this_process(folder: Path, shape: str, work: str, samples: int) -> None:
    """Prunes, quantises or both, writes the checkpoint, and prints the peak and the seconds; run in a child."""
    import torch

    from edgeprune.model.load import load_model
    from edgeprune.model.save import save_checkpoint
    from edgeprune.precision import WEIGHT_FORMATS
    from edgeprune.pruning.methods import DEFAULT, METHODS
    from edgeprune.pruning.prune import prune

    model = load_model(str(folder / "dense"))
    ids = torch.randint(0, model.decoder.vocab_size, (samples, LENGTH), generator=torch.Generator().manual_seed(0))
    target = model.decoder if work == "quantise" else model.decoder.with_widths(*WIDTHS[shape])
    if work != "prune":
        target = target.with_format(*(WEIGHT_FORMATS[name] for name in FORMATS))
    start = time.monotonic()
    save_checkpoint(target, prune(model, target, ids, METHODS[DEFAULT], 0), model, folder / work)
    print(json.dumps({"peak": peak_bytes(), "seconds": time.monotonic() - start}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", default="22,44")
    parser.add_argument("--work", default=",".join(LIMITS["1b"]))
    parser.add_argument("--files", default="safetensors,bin")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        if arguments.work == "convert":
            convert_in_this_process(arguments.child)
        else:
            walk_in_this_process(arguments.child, arguments.shape, arguments.work, arguments.samples)
        return
    for layers in map(int, arguments.layers.split(",")):
        for suffix in arguments.files.split(","):
            with tempfile.TemporaryDirectory() as name:
                _measure(Path(name), arguments.shape, layers, suffix, arguments.work.split(","), arguments.samples)


def _measure(folder: Path, shape: str, layers: int, suffix: str, work: list[str], samples: int) -> None:
    """Prints the peak and the seconds of each kind of work on a model of so many layers, each in a fresh process."""
    (folder / "dense").mkdir()
    write_checkpoint(folder / "dense", layers, suffix, shape)
    files = list((folder / "dense").glob(f"*.{suffix}"))
    size = sum(file.stat().st_size for file in files)
    for kind in work:
        words = [sys.executable, __file__, "--child", str(folder), "--shape", shape, "--work", kind]
        words += ["--samples", str(samples)]
        result = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        used = json.loads(result.stdout.splitlines()[-1])
        print(
            f"{kind}: {layers} layers, {size / 1e9:.2f} GB in {len(files)} .{suffix} files: "
            f"peak {used['peak'] / 1e9:.2f} GB, limit {LIMITS[shape][kind]:.2f} GB; {used['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
