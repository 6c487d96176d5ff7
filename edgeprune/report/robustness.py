"""The part of report.json about odd input: what each change of the held-out text costs. It evaluates nothing itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, log1p
from typing import Any

from pydantic import Field

from edgeprune.ondevice.budget import format_percent
from edgeprune.report.base import Strict
from edgeprune.report.quality import Text, text_part

FAR = 2.0  # times the rise of the unchanged text, in nats
LEAST_PERCENT = 5.0  # that a rise is beyond that of the unchanged text


class Variant(Text):
    """A form of the held-out text, or another text, in a few short windows; each window is a document."""

    words: str = Field(description="how it was changed")


class Robustness(Strict):
    """The fitted model against the dense one on odd input: a few windows of each variant, the weights in fp32."""

    variants: list[Variant] = Field(min_length=1, description="the unchanged text first")
    finding: str = Field(
        description=f"the worst one in words, where its rise in nats is more than {FAR:g} times that of the unchanged "
        "text, at the near ends of their intervals; else empty"
    )


def robustness_part(rows: Sequence[Mapping[str, Any]] | None) -> Robustness | None:
    """Returns the report's form of robustness.judged's results; none where there are none."""
    if rows is None:
        return None
    variants = [Variant(**text_part(row["name"], row), words=row["words"]) for row in rows]
    return Robustness(variants=variants, finding=_finding(variants))


def _finding(variants: Sequence[Variant]) -> str:
    """Returns the worst variant in words, where it is far worse than the unchanged one; else an empty text."""
    clean, *others = variants
    far = [variant for variant in others if _is_far_worse(variant, clean)]
    if not far:
        return ""
    worst = max(far, key=lambda variant: _nats(variant.low_percent))
    rise, of_clean = (format_percent(variant.rise_percent) for variant in (worst, clean))
    return (
        f"On odd input it is far worse: perplexity {rise} on `{worst.name}` ({worst.words}), {of_clean} on the same "
        "text as it is."
    )


def _is_far_worse(variant: Variant, clean: Variant) -> bool:
    least, most = _nats(variant.low_percent), max(0.0, _nats(clean.high_percent))
    return least > FAR * most and least > most + log1p(LEAST_PERCENT / 100)


def _nats(percent: float) -> float:
    """Returns a rise of perplexity in nats; one that is not a number is infinite."""
    return inf if percent != percent else log1p(percent / 100)
