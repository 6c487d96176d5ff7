"""The log of edgeprune and of the libraries that it uses, whose progress bars and warnings are silenced.

It knows nothing of the progress that edgeprune itself shows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from pathlib import Path

from edgeprune.errors import InputError


class _Shown(logging.Handler):
    """Writes to what is standard error at that moment: on a terminal, above the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is not None:
            sys.stderr.write(f"{self.format(record)}\n")


class _File(logging.FileHandler):
    """Writes to the log file until that fails once."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Ends the log with one warning, the command goes on."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        logging.getLogger().removeHandler(self)
        with contextlib.suppress(OSError):  # what is left of the line
            self.close()
        logging.getLogger("edgeprune").warning("the log %s ends here: %s", self.baseFilename, error.strerror or error)


def set_up(verbose: bool, log_file: Path | None) -> None:
    """Sets up the log: warnings of edgeprune on standard error, with `verbose` all of it; everything in `log_file`.

    Raises InputError where the file cannot be written.
    """
    # Silence the libraries.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Send the messages where the user asked for them.
    logger = logging.getLogger("edgeprune")
    logger.setLevel(logging.DEBUG)
    logger.propagate = log_file is not None
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, _Shown)]
    logger.addHandler(_Shown(logging.DEBUG if verbose else logging.WARNING))
    if log_file is not None:
        try:
            handler = _File(log_file, encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write the log {log_file}: {error.strerror}", "Name another file.") from None
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        logging.getLogger().addHandler(handler)
        logging.captureWarnings(True)
