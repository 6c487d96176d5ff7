"""The log of edgeprune and of the libraries that it uses, whose progress bars and warnings are silenced.

It knows nothing of the progress that edgeprune itself shows.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeprune.errors import InputError

EVENT = "event_fields"  # the attribute of a record that holds an event


class _Shown(logging.Handler):
    """Writes to what is standard error at that moment: on a terminal, above the bars. Events are shown there already,
    as progress."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is not None and not hasattr(record, EVENT):
            sys.stderr.write(f"{self.format(record)}\n")


class _Json(logging.Formatter):
    """Formats a record as one line of JSON: time (UTC), level, logger, message, and the fields of an event."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        line |= getattr(record, EVENT, {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


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


def log_event(event: str, message: str, **fields: Any) -> None:
    """Writes an event of a run into the log: `event` names its kind, fields are what else a program may read of it."""
    logging.getLogger("edgeprune.run").info("%s", message, extra={EVENT: {"event": event, **fields}})


def set_up(verbose: bool, log_file: Path | None) -> None:
    """Sets up the log: warnings of edgeprune on standard error, with `verbose` all of it; everything in `log_file`, in
    lines of JSON.

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
        handler.setFormatter(_Json())
        logging.getLogger().addHandler(handler)
        logging.captureWarnings(True)
