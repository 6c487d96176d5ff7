"""The result of every command: the bundle, its document, and whether the budget was met."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

Document = TypeVar("Document")


@dataclass(frozen=True)
class Result(Generic[Document]):
    """bundle: the folder that was written or read, None for a command that writes none. report: of fit, measure and
    load_bundle a Report (docs/report.md), of frontier a Frontier, of compare its rows, of plan one Plan a device, of
    samples a SamplesReport."""

    bundle: Path | None
    report: Document

    @property
    def met(self) -> bool:
        """Returns whether budget and quality limit are met, or plans fit; True where nothing was asked for."""
        documents: Any = self.report if isinstance(self.report, list) else [self.report]
        return all(
            getattr(document, "outcome", "met") == "met" and getattr(document, "fits", True) for document in documents
        )
