"""AutoRound on the turned demo: the weights that it rounds, for the table of docs/bytes.md.

    pip install auto-round  # beside edgeprune
    python -m tools.autoround --sotu package/data --handbook handbook/usr/share/doc/debian-handbook/html \\
        --out autoround.safetensors

Symmetric codes of 4 bits in groups of 64 (Cheng et al. 2023, arXiv 2309.05516) by the package `auto-round` at its own
defaults, on the samples of that table. About an hour of a processor. The file holds the layers' weights in fp32 by the
names of edgeprune, and in its metadata what they took.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgeprune.model.load import load_model
from edgeprune.model.save import save_checkpoint
from edgeprune.model.tokens.tokenizer import load_tokenizer
from tools.turned import turned

GROUP, ITERATIONS, SAMPLES = 64, 200, 16
BATCH = 4  # samples of an iteration: half of its default, which would take twice as long
PLACES = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def on_its_grid(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns codes times scales in fp32 of a weight (out_features, in_features) that was rounded in another type.

    scales: (out_features, groups). Raises ValueError where a weight is far from every code of 4 bits.
    """
    scales = scales.float().reshape(len(weight), -1, 1)
    exact = weight.float().unflatten(1, (scales.shape[1], -1)) / scales
    codes = exact.round()
    if not ((exact - codes).abs().max() < 0.1 and codes.min() >= -8 and codes.max() <= 8):
        raise ValueError("the weights of AutoRound are not on its grid")
    return (codes * scales).flatten(1)


def rounded(folder: Path, ids: torch.Tensor, iterations: int) -> tuple[dict[str, torch.Tensor], float]:
    """Returns the layers' rounded weights of a checkpoint by edgeprune's names, and the seconds of processor time.

    ids: (samples, tokens) int64.
    """
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings: dict[str, Any] = {"bits": 4, "group_size": GROUP, "sym": True, "iters": iterations, "batch_size": BATCH}
    samples = {"dataset": list(ids.split(1)), "nsamples": len(ids), "seqlen": ids.shape[1]}
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(folder),
        **settings,
        **samples,
        device_map="cpu",
        enable_torch_compile=False,  # which needs a compiler
    )
    start = time.process_time()
    result, _ = tuner.quantize()
    seconds = time.process_time() - start
    weights = {}
    for index, layer in enumerate(result.model.layers):
        for name, place in PLACES.items():
            linear = layer.get_submodule(place)
            weights[f"layers.{index}.{name}"] = on_its_grid(linear.weight.detach(), linear.scale).contiguous()
    return weights, seconds


def main() -> None:
    from tools.quality import LENGTH, read_texts

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sotu", type=Path, required=True)
    parser.add_argument("--handbook", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model = turned(load_model("demo"))
    texts = read_texts(arguments.sotu, arguments.handbook, load_tokenizer(model.directory))
    ids = torch.from_numpy(texts.rows(SAMPLES, 0))  # (SAMPLES, LENGTH)
    assert ids.shape[1] == LENGTH
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "turned"
        save_checkpoint(model.decoder, model.weights.items(), model, checkpoint, dtype=torch.float32)
        weights, seconds = rounded(checkpoint, ids, arguments.iterations)
    save_file(weights, arguments.out, {"iterations": str(arguments.iterations), "seconds": f"{seconds:.1f}"})


if __name__ == "__main__":
    main()
