"""deployment.json: all that finish.pyz needs to build, check, measure and judge a bundle without edgeprune.

It does not know how a device reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgeprune.engine.build_memory import build_limit, build_memory
from edgeprune.engine.estimate import counted, estimate_performance, workspace_bytes
from edgeprune.engine.llamacpp import counted_of
from edgeprune.engine.onnx.graph import GraphVariant
from edgeprune.ondevice.budget import Limit, in_parts
from edgeprune.ondevice.figures import figure_to_json
from edgeprune.ondevice.llamacpp import MODEL_FILE
from edgeprune.ondevice.measure import Counted
from edgeprune.ondevice.runtimes import LLAMA_CPP, RUNTIMES
from edgeprune.pipeline.results import Fitted


def deployment(rungs: Sequence[Fitted]) -> dict[str, Any]:
    """Returns the document of a bundle's rungs, the largest first.

    Limits are in bytes and ms; relative ones are resolved by the dense model's figures of this run.
    """
    # All rungs share the setup and the dense model of the first.
    first = rungs[0]
    setup = first.setup
    deployed = (setup.profile, setup.workload, setup.precision)
    on_gpu = RUNTIMES[setup.profile.engine].on_gpu
    absolute = setup.budget.absolute(first.dense).limits
    return {
        "device": setup.profile.name,
        "engine": setup.profile.engine,
        "sm": setup.profile.sm,
        "precision": setup.precision,
        "older_graph": GraphVariant("primitive", "last").filename,
        "workload": dict(setup.workload.__dict__),
        "limits": {
            name: {"value": absolute[name], "asked": _asked(name, limit, first)}
            for name, limit in setup.budget.limits.items()
        },
        "build_memory": build_limit(setup.profile),
        "runtime": figure_to_json(estimate_performance(setup.model.decoder, *deployed).memory.runtime),
        "rungs": [
            {
                "graph": GraphVariant(
                    setup.profile.for_cache(rung.chosen.decoder.cache_format).dialect, "last"
                ).filename,
                "counted": dict(_counted(rung).__dict__),
                "cache": form.name if (form := rung.chosen.decoder.cache_format) else "float",
                "workspace_bytes": workspace_bytes(rung.chosen.decoder, *deployed),
                "build_bytes": int(build_memory(rung.chosen.decoder, *deployed).total) if on_gpu else None,
            }
            for rung in rungs
        ],
    }


def _counted(fitted: Fitted) -> Counted:
    """Returns the bytes of the graph or the file that the engine runs."""
    setup, exported = fitted.setup, fitted.chosen.exported
    if setup.profile.engine == LLAMA_CPP:
        return counted_of(exported.engine / MODEL_FILE, exported.decoder, setup.workload)
    return counted(exported.decoder, setup.precision, setup.workload)


def _asked(name: str, limit: Limit, fitted: Fitted) -> str:
    """Returns a limit in the user's words; a relative one with the figure of the dense model that it refers to."""
    reckoned = in_parts(name, limit, fitted.dense)
    return limit.asked if reckoned is None else f"{limit.asked} ({reckoned})"
