"""Where edgeprune keeps what it can make again: converted models, probed figures, statistics."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder; the environment variable EDGEPRUNE_CACHE overrides it."""
    import platformdirs

    return Path(os.environ.get("EDGEPRUNE_CACHE") or platformdirs.user_cache_dir("edgeprune"))
