"""edgeprune: fit a decoder-only transformer into a device's memory and latency budget.

The command line's words as functions: see docs/python.md.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeprune.commands.compare import compare
    from edgeprune.commands.fit import fit
    from edgeprune.commands.frontier import frontier
    from edgeprune.commands.load_bundle import load_bundle
    from edgeprune.commands.measure import measure
    from edgeprune.commands.plan import plan

try:
    __version__ = version("edgeprune")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = ["__version__", "compare", "fit", "frontier", "load_bundle", "measure", "plan"]


def __getattr__(name: str) -> Any:
    """Imports a function when it is first asked for: `import edgeprune` starts in milliseconds."""
    if name.startswith("_") or name not in __all__:
        raise AttributeError(f"module 'edgeprune' has no attribute {name!r}")
    function = getattr(import_module(f"edgeprune.commands.{name}"), name)
    globals()[name] = function
    return function


def __dir__() -> list[str]:
    return __all__
