"""The published latencies that the figures of the profiles are fitted to (fits.py): published.json, with sources.

It does not know our graphs: the points are of runtimes that update their KV cache in place, and the copies that our
graphs make in addition are not part of them. `trials` are points that no fit uses: what the estimates are tried on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edgeprune.engine.work import cache_bytes, prefill_flops
from edgeprune.model.decoder import Attention, Decoder, Layer, Mlp, Rotary
from edgeprune.ondevice.figures import Workload
from edgeprune.precision import WEIGHT_FORMATS

FILE = Path(__file__).with_name("published.json")
FAMILIES = {
    "fp16": "float",
    "bf16": "float",
    "w8a16": "int8",
    "int4_awq": "int4",
    "int4_awq_zp_g128": "int4",
    "w4a16_g128": "int4",
    "nvfp4": "nvfp4",
    "fp8": "fp8",
}  # of the formats of NVIDIA's runtimes
RUNTIMES = {
    "tensorrt-edge-llm": "TensorRT-Edge-LLM",
    "tensorrt-llm": "TensorRT-LLM",
    "compiled-other": "MLC LLM and TurboMind",
    "mlc": "MLC LLM",
    "vllm": "vLLM",
    "gpt-fast": "gpt-fast",
    "exllamav2": "ExLlamaV2",
    "llama.cpp-2024": "llama.cpp of 2024",
    "llama.cpp-2026": "llama.cpp of 2025 and 2026",
}


@dataclass(frozen=True)
class PublishedPoint:
    """One model's latencies in ms on one device, at batch 1; None where they are not published.

    bandwidth: of the device, bytes/s. weight_bytes: of the layers and the head in this format, as one step reads them.
    past: tokens in the cache before the step, which is fp16. request_ms: a whole request of `prompt` tokens and
    `generated` ones. uncertain: the configuration or the conditions are partly assumed.
    """

    device: str
    bandwidth: float
    runtime: str
    runtime_class: str
    precision: str
    model: str
    decoder: Decoder
    weight_bytes: float
    past: int | None = None
    decode_ms: float | None = None
    prompt: int | None = None
    prefill_ms: float | None = None
    generated: int | None = None
    request_ms: float | None = None
    source: str = ""
    note: str = ""
    uncertain: bool = False

    @property
    def layers(self) -> int:
        """Returns the number of layers."""
        return len(self.decoder.layers)

    @property
    def family(self) -> str:
        """Returns the family of the weight format, by which figures may differ."""
        return FAMILIES.get(self.precision, self.precision)

    @property
    def decode_bytes(self) -> float:
        """Returns the bytes that one decode step moves: weights, and the cache with the step's own token."""
        workload = Workload(batch=1, prompt=1, context=self.past + 1)
        return self.weight_bytes + cache_bytes(self.decoder, "fp16", workload, True)

    @property
    def matrix_bytes(self) -> float:
        """Returns the bytes of the layers' matrices: the weights but an fp16 head."""
        return self.weight_bytes - 2 * self.decoder.vocab_size * self.decoder.hidden_size

    @property
    def prefill_flops(self) -> float:
        """Returns the FLOPs of the prefill."""
        return prefill_flops(self.decoder, Workload(batch=1, prompt=self.prompt, context=self.prompt + 1))

    @property
    def matrix_flops(self) -> float:
        """Returns those of them that are products with the layers' matrices, not of attention or the head."""
        workload = Workload(batch=1, prompt=self.prompt, context=self.prompt + 1)
        formatted = self.decoder.with_format(WEIGHT_FORMATS["int8"])
        return self.prefill_flops - prefill_flops(formatted, workload, lambda form: float(form is None))


def decoder_of(sizes: dict[str, Any]) -> Decoder:
    """Returns the decoder of a published model from its sizes; its norms and biases are negligible."""
    attention = Attention(
        sizes["heads"], sizes["kv_heads"], sizes["head_dim"], Rotary((1.0,) * (sizes["head_dim"] // 2))
    )
    layer = Layer(attention, Mlp(sizes["intermediate_size"], gated=sizes["gated_mlp"]))
    return Decoder(
        "llama", sizes["hidden_size"], sizes["vocab_size"], 131072, 1e-6, sizes["tied"], (layer,) * sizes["layers"]
    )


@cache
def published() -> tuple[tuple[PublishedPoint, ...], tuple[PublishedPoint, ...]]:
    """Returns the points that the fits use, and the trials, which none uses."""
    data = json.loads(FILE.read_text(encoding="utf-8"))
    decoders = {name: decoder_of(sizes) for name, sizes in data["models"].items()}

    def point(row: dict[str, Any]) -> PublishedPoint:
        fields = {name: row[name] for name in row if name in PublishedPoint.__dataclass_fields__}
        rate = row.get("decode_tokens_per_s")
        return PublishedPoint(
            **fields
            | {
                "bandwidth": 1e9 * row["bandwidth_gb_per_s"],
                "decoder": decoders[row["model"]],
                "decode_ms": 1e3 / rate if rate else None,
                "source": data["sources"][row["source"]],
            }
        )

    return tuple(map(point, data["points"])), tuple(map(point, data["trials"]))


def points_of(device: str, *classes: str, kind: str = "decode") -> list[PublishedPoint]:
    """Returns the points of a device, of these classes of runtimes or of all, that have a figure of this kind."""
    return [
        point
        for point in published()[0]
        if point.device == device
        and (not classes or point.runtime_class in classes)
        and getattr(point, f"{kind}_ms") is not None
    ]
