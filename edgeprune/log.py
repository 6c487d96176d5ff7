"""One place for what libraries and edgeprune say: the log. Libraries' bars and warnings stay out of the way."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

from edgeprune.errors import InputError


def set_up(verbose: bool, log_file: Path | None) -> None:
    """Log edgeprune to standard error (with verbose) and everything to log_file. Raises InputError."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logger = logging.getLogger("edgeprune")
    logger.setLevel(logging.DEBUG)
    logger.propagate = log_file is not None
    if verbose:
        logger.addHandler(logging.StreamHandler())
    if log_file is not None:
        try:
            handler = logging.FileHandler(log_file, encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write the log {log_file}: {error.strerror}", "Name another file.") from None
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        logging.getLogger().addHandler(handler)
        logging.captureWarnings(True)
