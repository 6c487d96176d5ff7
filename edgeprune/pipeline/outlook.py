"""The time, memory and disk that a fit will take of this machine, told of a model's shape before any weight is read.

All of it is estimated, for a fit with its default options and samples of the user's own.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.generate.text import BATCH
from edgeprune.model.decoder import Decoder
from edgeprune.ondevice.runtimes import RUNTIMES
from edgeprune.pipeline.cache_formats import cache_choice
from edgeprune.pipeline.duration import MEASURED_CANDIDATES, Samples, Work, evaluating, measuring, searching
from edgeprune.pipeline.formats import weight_choice
from edgeprune.pipeline.kind import kind_of
from edgeprune.pipeline.packing import GENERATED
from edgeprune.pipeline.rates import Rates, probed
from edgeprune.pipeline.request import Request
from edgeprune.pipeline.room import disk_bytes, memory_bytes, memory_room
from edgeprune.profiles import DeviceProfile
from edgeprune.search.search import MAX_CANDIDATES


@dataclass(frozen=True)
class Outlook:
    """The work of a fit, at what rates this machine does it, and the bytes that it takes beside those that are there.

    memory: of each part by its name, of which the larger is the peak; has_memory: of the machine, with free swap, None
    where it does not tell; has_disk: free in the current folder.
    """

    work: Work
    rates: Rates
    memory: dict[str, int]
    has_memory: int | None
    disk: int
    has_disk: int

    @property
    def seconds(self) -> float:
        """Returns how long the fit takes here."""
        return self.work.at(self.rates)

    @property
    def lacking(self) -> list[str]:
        """Returns what this machine has too little of."""
        memory = self.has_memory is not None and max(self.memory.values()) > self.has_memory
        return ["memory"] * memory + ["disk"] * (self.disk > self.has_disk)

    def as_json(self) -> dict[str, Any]:
        """Returns seconds, FLOP by kind of work, bytes, and what is lacking."""
        return {
            "source": "estimated",
            "seconds": self.seconds,
            "work": asdict(self.work),
            "rates": asdict(self.rates),
            "memory_bytes": self.memory,
            "has_memory_bytes": self.has_memory,
            "disk_bytes": self.disk,
            "has_disk_bytes": self.has_disk,
            "lacking": self.lacking,
        }


def outlook(decoder: Decoder, profile: DeviceProfile, precision: str, rates: Rates | None = None) -> Outlook:
    """Returns what a fit of the dense decoder for a device takes of this machine. Raises InputError.

    rates: of this machine; None: they are found out on the model's shape. Candidates are measured where the device is
    this machine's processor; those of another one are estimated.
    """
    request, kind = Request(), kind_of(decoder)
    samples = _default_samples(decoder)
    weights, cache = weight_choice(request.weights, profile, decoder), cache_choice(request.cache, profile)
    measures = not RUNTIMES[profile.engine].on_gpu
    candidates = MEASURED_CANDIDATES if measures else 1
    work = searching(decoder, samples, weights.quantised, cache.quantised, precision, candidates)
    work += evaluating(decoder, samples, kind.writes_text) * 2
    if measures:
        work += measuring(decoder, profile, precision, weights, candidates, one_width=False)
    return Outlook(
        work,
        rates or probed(decoder, BATCH),
        default_memory(decoder),
        memory_room(),
        disk_bytes(decoder, precision, MAX_CANDIDATES if measures else 1, builds=False, measures=measures),
        shutil.disk_usage(Path.cwd()).free,
    )


def default_memory(decoder: Decoder) -> dict[str, int]:
    """Returns the bytes that the two largest parts of a fit with default options hold, as room.memory_bytes does."""
    samples = _default_samples(decoder)
    return memory_bytes(decoder, samples.pruned, samples.length)


def _default_samples(decoder: Decoder) -> Samples:
    request = Request()
    length = kind_of(decoder).sample_length(request, decoder)
    return Samples(request.samples, GENERATED, length, request.samples * length)
