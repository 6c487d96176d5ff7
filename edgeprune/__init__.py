"""edgeprune: fit a decoder-only transformer into a device's memory and latency budget.

The command line's words as functions: see docs/python.md.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeprune.commands.compare import compare
    from edgeprune.commands.diff import diff
    from edgeprune.commands.draft import draft
    from edgeprune.commands.drift import drift
    from edgeprune.commands.fit import fit
    from edgeprune.commands.fleet import fleet
    from edgeprune.commands.frontier import frontier
    from edgeprune.commands.load_bundle import load_bundle
    from edgeprune.commands.measure import measure
    from edgeprune.commands.plan import plan
    from edgeprune.commands.samples import samples
    from edgeprune.commands.task_scores import task_scores

    __version__: str

__all__ = [
    "__version__",
    "compare",
    "diff",
    "draft",
    "drift",
    "fit",
    "fleet",
    "frontier",
    "load_bundle",
    "measure",
    "plan",
    "samples",
    "task_scores",
]


def __getattr__(name: str) -> Any:
    """Imports what is first asked for: `import edgeprune` starts in milliseconds."""
    if name not in __all__:
        raise AttributeError(f"module 'edgeprune' has no attribute {name!r}")
    from importlib import import_module

    value = _version() if name == "__version__" else getattr(import_module(f"edgeprune.commands.{name}"), name)
    globals()[name] = value
    return value


def _version() -> str:
    """Returns the version that is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("edgeprune")
    except PackageNotFoundError:  # a checkout that is not installed
        return "0+unknown"


def __dir__() -> list[str]:
    return __all__
