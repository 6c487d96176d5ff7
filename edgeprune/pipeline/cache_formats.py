"""The formats of the KV cache that a search may choose from: what was asked for, what the engine runs.

It does not know what a format costs, nor what it loses.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeprune.errors import InputError
from edgeprune.pipeline.formats import ASKED, AUTO, FLOAT
from edgeprune.precision import CACHE_FORMATS, CacheFormat
from edgeprune.profiles import DeviceProfile
from edgeprune.search.widths import Cache


@dataclass(frozen=True)
class CacheChoice:
    """The formats of a search; reason: in words."""

    formats: tuple[Cache, ...]
    reason: str

    @property
    def quantised(self) -> tuple[CacheFormat, ...]:
        """Returns all but floats."""
        return tuple(form for form in self.formats if form is not None)

    @property
    def names(self) -> str:
        """Returns the names of the formats."""
        return ", ".join(form.name if form else FLOAT for form in self.formats)


def cache_choice(asked: str, profile: DeviceProfile) -> CacheChoice:
    """Returns the formats that a request may use on a device.

    asked: `auto`, or `float`, `int8` and `fp8`, separated by commas. Raises InputError for a word that is none of
    these, and for a format that the device's engine does not run.
    """
    words = [word.strip() for word in asked.split(",")]
    if words != [AUTO]:
        return CacheChoice(tuple(dict.fromkeys(_named(word, profile) for word in words)), ASKED)
    offers = offered(profile)
    known = [CACHE_FORMATS[name] for name in offers if profile.cache[name].confidence != "low"]
    if known:
        return CacheChoice((None, *known), f"{profile.name} is known to run {' and '.join(f.name for f in known)}")
    reason = f"{profile.name} runs floats alone"
    if offers:
        reason = f"{' and '.join(offers)} can be asked for: nobody measured their speed on {profile.name}"
    return CacheChoice((None,), reason)


def offered(profile: DeviceProfile) -> list[str]:
    """Returns the names of the formats that the device runs with the graph that it is given."""
    return [] if profile.dialect == "primitive" else list(profile.cache)


def _named(word: str, profile: DeviceProfile) -> Cache:
    """Returns the format of a word. Raises InputError."""
    if word == FLOAT:
        return None
    if word not in CACHE_FORMATS:
        raise InputError(f"unknown cache {word[:60]!r}", f"Give auto, or some of {', '.join((FLOAT, *CACHE_FORMATS))}.")
    if word in offered(profile):
        return CACHE_FORMATS[word]
    runs = ", ".join((FLOAT, *offered(profile)))
    if word in profile.cache:
        raise InputError(
            f"the graph in operators of opset 17 for {profile.name} has a KV cache of floats, not {word}",
            "Give --cache float, --precision fp16, or with --tensorrt the version 10.15 or newer.",
        )
    raise InputError(f"{profile.name} runs no KV cache in {word}", f"It runs {runs}: --cache auto.")
