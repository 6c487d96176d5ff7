"""Where edgeprune keeps what it can make again: converted models, probed figures, statistics, kernel timings.

This file also runs on the device, where EDGEPRUNE_CACHE is always set.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder; the environment variable EDGEPRUNE_CACHE overrides it."""
    if given := os.environ.get("EDGEPRUNE_CACHE"):
        return Path(given)
    import platformdirs

    return Path(platformdirs.user_cache_dir("edgeprune"))
