"""A file that a package installed, located by the package's own list of files; the package is never imported.

It does not know what is in the file.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def packaged_file(package: str, name: str) -> Path | None:
    """Returns the path of the file; None where the package is not installed or has no file of that name."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        return None
    return next((path for file in files if file.name == name and (path := Path(str(file.locate()))).is_file()), None)
