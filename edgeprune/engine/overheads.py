"""The times of a decode step and of a prefill that scale neither with bytes nor with FLOPs, as a profile gives them.

A profile has a constant, or a time for each layer: half of it for its attention and half for its MLP.
"""

from __future__ import annotations

from edgeprune.model.decoder import Decoder
from edgeprune.profiles import DeviceProfile


def fixed_times(profile: DeviceProfile) -> dict[str, float]:
    """Returns the ms of a prefill and of a decode step that no module adds to."""
    decode = 1e3 * profile.decode_overhead.si if profile.decode_overhead else 0.0
    return {
        "prefill": decode + (1e3 * profile.prefill_overhead.si if profile.prefill_overhead else 0.0),
        "decode": decode,
    }


def modules_in_layers(decoder: Decoder) -> float:
    """Returns the number of layers, one that has lost its attention or its MLP as half of one."""
    return sum((layer.attention is not None) + (layer.mlp is not None) for layer in decoder.layers) / 2


def overhead_ms(decoder: Decoder, profile: DeviceProfile) -> float:
    """Returns the ms of a decode step that scale neither with bytes nor with FLOPs."""
    of_layer = 1e3 * profile.layer_overhead.si if profile.layer_overhead else 0.0
    return fixed_times(profile)["decode"] + modules_in_layers(decoder) * of_layer
