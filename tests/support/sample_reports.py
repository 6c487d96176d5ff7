"""Reports made up for tests: the shapes are SmolLM2-135M's, the figures are invented but consistent."""

from __future__ import annotations

from typing import Any

from edgeprune.evaluate.agreement import wilson
from edgeprune.ondevice.figures import Built, Estimate, Measured
from edgeprune.report.schema import Figure, Report, figure_of, grade_of

PROMPT = "Explain in a few sentences why the sky is blue."
DENSE_TEXT = (
    "The sky is blue because of a phenomenon called Rayleigh scattering. Sunlight holds all colours, and the "
    "air's molecules scatter the short, blue wavelengths far more than the long, red ones."
)
SHAPE = {"dense": (9, 3, 1536), "fitted": (6, 2, 1472)}


MEASUREMENT = {
    "created": "2026-05-05T12:00:00+00:00",
    "where": "a board on the desk",
    "machine": "a board",
    "gpu": "Orin",
    "engine": "tensorrt",
    "version": "10.3",
    "rung": 0,
    "status": "met",
    "rests_on": "measured",
    "rungs": [],
    "performance": {},
}
"""What a board told when it was measured, but its figures."""


def estimated(value: float, unit: str = "ms", device: str = "jetson-orin") -> Figure:
    return figure_of(Estimate(value, unit, device, "410.6 MB per step / (204.8 GB/s x 0.8) + 1.53 ms"))


def built(value: float, unit: str = "bytes", device: str = "rtx-a4000") -> Figure:
    return figure_of(Built(value, unit, device, "the builder's total weights memory; TensorRT for RTX, SM 86"))


def measured(value: float, unit: str = "ms", spread: float = 0.02, device: str = "cpu") -> Figure:
    return figure_of(Measured(value, unit, device, value * (1 - spread), value * (1 + spread)))


def performance(parts: dict[str, Figure], prefill: Figure, decode: Figure, **more: Any) -> dict[str, Any]:
    total = next(iter(parts.values())).model_copy(
        update={"value": sum(p.value for p in parts.values()), "low": None, "high": None}
    )
    ratios = {"prefill_ratio": None, "decode_ratio": None, "percentiles": {}}
    return {"memory": parts, "memory_total": total, "prefill": prefill, "decode": decode, **ratios, **more}


def side(name: str, of: dict[str, Any], shares: tuple[float, ...], layers: int = 30) -> dict[str, Any]:
    heads, groups, channels = SHAPE[name]
    parameters = layers * 576 * (2 * 64 * (heads + groups) + 3 * channels)
    return {
        "performance": of,
        "layer_parameters": parameters,
        "parameters": parameters + 576 * 49152 + 576 * (2 * layers + 1),
        "decode_bytes": 2.0 * parameters,
        "widths": [{"query heads": heads, "key/value heads": groups, "MLP channels": channels} for _ in range(layers)],
        "latency_shares": dict(zip(("layers", "head_and_embedding", "cache", "overhead"), shares, strict=True)),
    }


def text(name: str, dense: float, rise: float, width: float = 1.5) -> dict[str, Any]:
    """The more perplexity rises, the fewer places agree."""
    agree = 95 / (1 + max(rise, 0) / 60)
    return {
        "name": name,
        "documents": 24,
        "tokens": 4096,
        "dense": dense,
        "fitted": dense * (1 + rise / 100),
        "rise_percent": rise,
        "low_percent": rise - width,
        "high_percent": rise + width,
        "agreement": {
            "percent": agree,
            "low_percent": 0.97 * agree,
            "high_percent": 1.02 * agree,
            "places": 4096,
            "documents": 24,
            "of": 24,
        },
    }


def answers(same: tuple[int, ...]) -> dict[str, Any]:
    """Of sixteen answers, those whose first 1, 2, 4, ... tokens are the dense model's."""
    return {
        "device": "AMD EPYC, 2 threads, fp32",
        "prompt_tokens": 32,
        "identical": [
            {
                "tokens": 2**step,
                "percent": 100 * count / 16,
                "low_percent": 100 * wilson(count, 16)[0],
                "high_percent": 100 * wilson(count, 16)[1],
                "same": count,
                "answers": 16,
            }
            for step, count in enumerate(same)
        ],
    }


def quality(
    texts: list[dict[str, Any]], fitted: str, label: str = "perplexity", same: tuple[int, ...] = (15, 14, 11, 7, 4, 2)
) -> dict[str, Any]:
    worst = max(entry["rise_percent"] for entry in texts)
    return {
        "label": label,
        "texts": texts,
        "rise_percent": worst,
        "grade": grade_of(worst),
        "answers": answers(same),
        "prompt": PROMPT,
        "dense_sample": DENSE_TEXT,
        "fitted_sample": fitted,
    }


def experience(
    sides: dict[str, dict[str, Any]], limit: float, reason: str, contexts: tuple[int, int], sequences: tuple[int, int]
) -> dict[str, Any]:
    """Contexts and sequences of the dense and the fitted model; all else follows from their figures."""
    found = {}
    for (name, of), context, count in zip(sides.items(), contexts, sequences, strict=True):
        decode = of["performance"]["decode"]
        rate = decode.model_copy(
            update={
                "value": 1000 / decode.value,
                "unit": "tokens/s",
                "low": decode.high and 1000 / decode.high,
                "high": decode.low and 1000 / decode.low,
            }
        )
        factor = {key: getattr(rate, key) and getattr(rate, key) / 5.2757 for key in ("value", "low", "high")}
        found[name] = {
            "first_token": of["performance"]["prefill"],
            "tokens_per_second": rate,
            "reading_speed": rate.model_copy(update={**factor, "unit": "1"}),
            "longest_context": estimated(context, "tokens"),
            "sequences": estimated(count, "sequences"),
            "room": {
                "limit": limit,
                "reason": reason,
                "most_context": 8192,
                "context_bytes": 47112.0,
                "sequence_bytes": 98e6,
            },
        }
    return found


def modules(layers: int = 30) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "kind": kind,
            "kept": kept,
            "of": of,
            "damping": None if layer == 7 else 0.01,
            "error_before": 0.08 + layer / 400,
            "error_after": 0.05 + layer / 500,
            "fell_back": layer == 7,
        }
        for layer in range(layers)
        for kind, kept, of in (("attention", 2, 3), ("mlp", 1472, 1536))
    ]


def candidate(
    widths: tuple[int, int, int], values: dict[str, tuple[float, float]], status: str, chosen: bool
) -> dict[str, Any]:
    names = ("num_key_value_heads", "heads_per_group", "intermediate_size")
    return {
        "widths": dict(zip(names, widths, strict=True)),
        "status": status,
        "chosen": chosen,
        "predicted_loss": 0.1 * (3 * 1536 - widths[0] * widths[2]) / 1536,
        "predicted": {name: value[0] for name, value in values.items()},
        "obtained": {name: value[1] for name, value in values.items()},
    }


def estimated_content() -> dict[str, Any]:
    """Memory 90 % on a Jetson that is not reachable: everything but the quality is estimated."""
    names = ("weights", "cache", "activations", "buffers", "runtime")
    dense, fitted = (
        {name: estimated(value, "bytes") for name, value in zip(names, values, strict=True)}
        for values in (
            (269030016, 94371840, 52933248, 126968, 450000000),
            (244699776, 62914560, 36555520, 126968, 450000000),
        )
    )
    sides = {
        "dense": side("dense", performance(dense, estimated(7.37), estimated(4.04)), (1.296, 0.346, 0.864, 1.53)),
        "fitted": side("fitted", performance(fitted, estimated(6.61), estimated(3.60)), (1.148, 0.346, 0.576, 1.53)),
    }
    limit = 0.9 * 416462072 + 450000000
    return {
        "edgeprune": "0.1.0",
        "created": "2026-05-04T12:00:00+00:00",
        "seed": 0,
        "precision": "fp16",
        "command": "edgeprune fit demo --device jetson-orin --memory 90% --output smollm2-orin",
        "headline": "SmolLM2-135M-Instruct meets memory 90% on jetson-orin (estimated), at +11.4 % perplexity, "
        "11 % pruned.",
        "status": "met",
        "rests_on": "estimated",
        "quality_status": "met",
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "family": "llama",
            "hidden_size": 576,
            "layers": 30,
            "vocab_size": 49152,
            "fingerprint": "02ef3b1d523ff080f661a25c22031326ac793c4e3155f3ae0bbfda1764cc01d2",
        },
        "device": {
            "name": "jetson-orin",
            "description": "NVIDIA Jetson AGX Orin 64 GB developer kit",
            "figures": {
                "memory": {"value": 64, "unit": "GB", "source": "vendor page", "confidence": "high"},
                "decode_efficiency": {
                    "value": 0.8,
                    "unit": "1",
                    "confidence": "high",
                    "source": "fit of published decode figures, INT4, past 2048, four models; worst error 2.3 %",
                },
                "system_reserve": {"value": 2, "unit": "GB", "source": "assumed, headless", "confidence": "low"},
            },
        },
        "workload": {"batch": 1, "prompt": 512, "context": 2048},
        "engine": {"name": "tensorrt", "reason": "engines for SM 87 are built on the device itself"},
        "choices": [
            {
                "name": "engine",
                "value": "tensorrt",
                "reason": "engines for SM 87 are built on the device itself, which is not reachable from here: "
                "latency and memory are estimates",
            },
            {"name": "precision", "value": "fp16", "reason": "the profile's"},
            {"name": "calibration", "value": "self", "reason": "no text was given: the model generates its own"},
        ],
        "versions": {"python": "3.12.4", "torch": "2.13.0", "onnx": "1.23.2"},
        "budget": [
            {
                "name": "memory",
                "asked": "90%",
                "limit": limit,
                "unit": "bytes",
                "status": "met",
                **{name: of["performance"]["memory_total"] for name, of in sides.items()},
            }
        ],
        "ratio": 0.115,
        "total_ratio": 0.091,
        "decode_bytes_ratio": 0.174,
        **sides,
        "experience": experience(sides, limit, "the memory budget", (1187, 2510), (0, 1)),
        "unprunable": "46 % of the dense model's time per token (1.88 ms of 4.04 ms, estimated) is overhead, embedding "
        "and head; so are 21 % of its weights: no narrowing of layers removes them. With embedding and head in int8, "
        "which the search may take, 1.42 ms a token are left of that time, and 27.1 MiB of the 54.0 MiB of both.",
        "floor": {"memory": 566145784.0, "prefill": 1.976, "decode": 2.2585},
        "search": {
            "ending": "neighbour",
            "reason": "every better candidate on the width grid exceeds the budget",
            "candidates": [
                candidate((3, 3, 1216), {"memory": (822.1e6, 828.4e6)}, "missed", False),
                candidate((2, 3, 1472), {"memory": (794.3e6, 794.3e6)}, "met", True),
            ],
        },
        "quality_stop": None,
        "quality": quality(
            [text("generated by the dense model", 3.1, 11.4)],
            DENSE_TEXT.replace("Rayleigh scattering", "scattering"),
            "agreement with the dense model",
        ),
        "modules": modules(),
        "cross_check": {"prefill_ratio": measured(0.91, "1", 0.03), "decode_ratio": measured(0.88, "1")},
        "deploy": [
            {
                "title": "Copy the bundle to the NVIDIA Jetson AGX Orin 64 GB developer kit; build the engine and "
                "measure it there",
                "command": "scp -r smollm2-orin USER@DEVICE:\n"
                "ssh USER@DEVICE 'cd smollm2-orin && bash build_and_measure.sh'",
            },
            {"title": "Try it on this machine", "command": f"edgeprune run smollm2-orin --prompt '{PROMPT}'"},
        ],
        "stages": {"dense": 2.3, "samples": 61.0, "candidate-1": 22.1, "evaluation": 14.9},
        "files": {"rungs/0/onnx/model.onnx": 182_331, "rungs/0/onnx/layers.data": 188_006_400},
        "warnings": [
            "Latency was not measured on the device: build and measure there before you decide.",
            "Quality was measured on text that the dense model generated: agreement, not quality.",
        ],
    }


def measured_content() -> dict[str, Any]:
    """Decode 70 % on this machine's processor, with a quality limit, two texts of the user's own."""
    content = estimated_content()
    names = ("weights", "cache", "activations", "buffers", "runtime")
    dense, fitted = (
        {name: measured(value, "bytes", 0.0) for name, value in zip(names, values, strict=True)}
        for values in ((538060032, 94371840, 81788928, 253936, 31e6), (372310016, 62914560, 70254592, 253936, 31e6))
    )
    percentiles = {
        "prefill": {"p50": 611.0, "p90": 640.2, "p99": 702.8, "mad": 9.1},
        "decode": {"p50": 34.1, "p90": 36.0, "p99": 41.7, "mad": 0.6},
    }
    ratios = {"prefill_ratio": measured(0.667, "1", 0.03), "decode_ratio": measured(0.681, "1", 0.015)}
    sides = {
        "dense": side(
            "dense",
            performance(dense, measured(911), measured(50.1), percentiles={"prefill": {"p50": 911.0}}),
            (34.0, 9.1, 5.2, 1.8),
        ),
        "fitted": side(
            "fitted",
            performance(fitted, measured(611), measured(34.1), percentiles=percentiles, **ratios),
            (18.5, 9.1, 3.5, 1.8),
        ),
    }
    rise = Figure(value=24.6, unit="%", source="measured", device="held-out text", low=21.9, high=27.4)
    return content | {
        "command": "edgeprune fit demo --device cpu --decode 70% --memory 600MB --max-quality-loss 30% "
        "--calibration notes/ --evaluate manual.txt",
        "headline": "SmolLM2-135M-Instruct meets decode 70% on cpu, at +24.6 % perplexity, 38 % pruned.",
        "deploy": content["deploy"][1:],
        "rests_on": "measured",
        "precision": "fp32",
        "warnings": [],
        "cross_check": None,
        "device": {"name": "cpu", "description": "This machine's processor", "figures": {}},
        "engine": {"name": "onnxruntime", "reason": "the device is this machine's processor", "version": "1.32.0"},
        "budget": [
            {
                "name": "decode",
                "asked": "70%",
                "limit": 35.07,
                "unit": "ms",
                "status": "met",
                "dense": measured(50.1),
                "fitted": measured(34.1),
            },
            {
                "name": "memory",
                "asked": "600MB",
                "limit": 600e6,
                "unit": "bytes",
                "status": "met",
                **{name: of["performance"]["memory_total"] for name, of in sides.items()},
            },
            {
                "name": "quality",
                "asked": "30%",
                "limit": 30.0,
                "unit": "%",
                "status": "met",
                "dense": None,
                "fitted": rise,
            },
        ],
        **sides,
        "experience": experience(sides, 600e6, "the memory budget", (0, 3350), (0, 1)),
        "search": {
            "ending": "close",
            "reason": "2.8 % of a limit is left",
            "candidates": [
                candidate((2, 3, 1088), {"decode": (34.2, 37.9), "memory": (540e6, 566e6)}, "missed", False),
                candidate((2, 3, 896), {"decode": (34.9, 35.3), "memory": (531e6, 545e6)}, "noisy", False),
                candidate((2, 3, 832), {"decode": (34.4, 34.1), "memory": (536e6, 537e6)}, "met", True),
            ],
        },
        "quality": quality(
            [text("manual.txt", 12.8, 24.6, 2.7), text("notes, one fifth held out", 9.9, 17.3, 4.4)], DENSE_TEXT[:120]
        ),
    }


def broken_content() -> dict[str, Any]:
    """Out of reach on the device, and the best candidate is of no use; its layers differ in width."""
    content = estimated_content()
    widths = [
        {
            "query heads": 3 if 8 < i < 26 else 9,
            "key/value heads": 1 if 8 < i < 26 else 3,
            "MLP channels": 256 + 32 * abs(i - 15),
        }
        for i in range(30)
    ]
    row = content["budget"][0] | {"asked": "560MB", "limit": 560e6, "status": "missed"}
    decode = {
        "name": "decode",
        "asked": "2.5ms",
        "limit": 2.5,
        "unit": "ms",
        "dense": estimated(4.04),
        "fitted": estimated(3.6),
        "status": "missed",
    }
    return content | {
        "headline": "SmolLM2-135M-Instruct does not reach memory 560MB, decode 2.5ms on jetson-orin: the best "
        "candidate is kept.",
        "status": "missed",
        "budget": [row, decode],
        "fitted": content["fitted"] | {"widths": widths},
        "search": {
            "ending": "out_of_reach",
            "reason": "the smallest candidate exceeds the budget",
            "candidates": [candidate((1, 3, 64), {"memory": (794e6, 794e6), "decode": (3.1, 3.6)}, "missed", True)],
        },
        "quality": quality(
            [text("generated by the dense model", 3.1, 4127.0, 380.0)],
            "the the the of of , , , the\n" * 6,
            same=(2, 0, 0, 0, 0, 0),
        ),
    }


def report_of(content: dict[str, Any]) -> Report:
    return Report.model_validate(content)


CONTENTS = (estimated_content, measured_content, broken_content)


def hostile(content: dict, text: str) -> dict:
    """The text wherever a user, a file or a model has a say."""
    content["quality"] |= {"prompt": text, "dense_sample": text, "fitted_sample": text}
    content["quality"]["answers"]["device"] = text
    for noticed in content["experience"].values():
        noticed["room"]["reason"] = text
    for entry in content["quality"]["texts"]:
        entry["name"] = text
    for row in content["budget"]:
        row["asked"] = text
    return content | {
        "headline": text,
        "command": text,
        "warnings": [text],
        "unprunable": text,
        "files": {text: 1},
        "model": content["model"] | {"name": text},
        "versions": {text: text},
        "stages": {text: 1.0},
        "device": content["device"] | {"name": text, "description": text},
        "deploy": [{"title": text, "command": text}],
        "search": content["search"] | {"reason": text},
    }
