"""The folder of what edgeprune can make again: converted models, probed figures, statistics, kernel timings.

This file also runs on the device, where EDGEPRUNE_CACHE is always set. It does not know what is kept there.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Returns the user's cache folder, which the environment variable EDGEPRUNE_CACHE overrides."""
    if folder := os.environ.get("EDGEPRUNE_CACHE"):
        return Path(folder)
    import platformdirs

    return Path(platformdirs.user_cache_dir("edgeprune"))
