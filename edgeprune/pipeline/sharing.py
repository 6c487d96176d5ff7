"""The dependencies of the stages that the runs of a fleet share: by what store.py finds them."""

from __future__ import annotations

import platform
from functools import cached_property
from typing import TYPE_CHECKING

from edgeprune.pipeline.provenance import versions

if TYPE_CHECKING:
    from edgeprune.pipeline.setup import Setup
    from edgeprune.pipeline.store import Parts


class Dependencies:
    """All that the shared stages of a run depend on, a little more where that is simpler; never less."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._print = setup, setup.fingerprint

    @cached_property
    def graph(self) -> Parts:
        """Returns those of the dense model's graphs in fp32, which have as many positions as are ever asked for."""
        setup = self._setup
        return {
            "versions": versions(),
            "model": self._print["model"],
            "positions": max(setup.workload.context, setup.length),
        }

    @cached_property
    def samples(self) -> Parts:
        """Returns those of the samples, and of what the dense model alone makes of them."""
        names = ("samples", "sample_count", "length", "imaging", "seed")
        return {**self.graph, **{name: self._print[name] for name in names}}

    @cached_property
    def device(self) -> Parts:
        """Returns those of the dense model on its device; an engine that measures here does so on this machine."""
        names = ("profile", "workload", "precision", "engine", "target")
        machine = platform.node() if self._print["target"] is None else None
        return {**self.samples, **{name: self._print[name] for name in names}, "machine": machine}

    @cached_property
    def sensitivities(self) -> Parts:
        """Returns those of the losses of all cuts and of the formats that the search chooses among."""
        weights, cache = self._setup.weights, self._setup.cache
        forms = [[form and form.name for form in of] for of in (weights.quantised, weights.tables, cache.quantised)]
        return {**self.samples, "method": self._print["method"], "formats": forms}

    @cached_property
    def formats(self) -> Parts:
        """Returns those of the choice among formats that the device's builder holds in few bits."""
        return {**self.device, "weights": self._print["weights"]}

    @cached_property
    def evaluation(self) -> Parts:
        """Returns those of the dense model's losses on the evaluated texts; its answers to prompts have the same."""
        setup = self._setup
        return {**self.samples, "context": setup.workload.context, "exact": setup.profile.engine != "onnxruntime"}
