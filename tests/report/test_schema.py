"""report.json: reads back equal, refuses what it does not know, and is described by docs/report.md."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import cycle
from operator import getitem
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from edgeprune.report.frontier import frontier_of
from edgeprune.report.html import render_html
from edgeprune.report.schema import Report, grade_of, schema_markdown
from edgeprune.report.terminal import print_report
from tests.support import DOCS
from tests.support.sample_pictures import pictures_content
from tests.support.sample_reports import CONTENTS, broken_content, estimated_content, measured_content, report_of

DOCUMENT = DOCS / "report.md"
REMEDY = """docs/report.md is out of date; write it again:
python -c "from edgeprune.report.schema import schema_markdown as s; open('docs/report.md', 'w').write(s())" """


@pytest.mark.parametrize("content", CONTENTS)
def test_reads_back_equal(content):
    report = report_of(content())
    assert Report.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize("content", CONTENTS)
def test_the_json_follows_the_schema(content):
    jsonschema.validate(json.loads(report_of(content()).model_dump_json()), Report.model_json_schema())


def test_unknown_fields_are_refused_at_every_depth():
    for change in ("speed", "quality", "model"):
        content = json.loads(report_of(estimated_content()).model_dump_json())
        (content if change == "speed" else content[change])["invented"] = 1
        with pytest.raises(ValidationError, match="invented"):
            Report.model_validate(content)


def test_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        report_of(estimated_content()).status = "missed"


def test_another_schema_version_is_refused():
    with pytest.raises(ValidationError, match="schema_version"):
        Report.model_validate(estimated_content() | {"schema_version": 2})


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_destroyed_models_perplexity_survives(value):
    content = broken_content()
    content["quality"]["texts"][0] |= {"fitted": value, "rise_percent": value, "high_percent": value}
    content["quality"]["rise_percent"] = value
    text = report_of(content).model_dump_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert str(Report.model_validate_json(text).quality.texts[0].fitted) == str(value)
    assert grade_of(value) == "broken"


@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6))
def test_headroom_is_what_is_left_of_the_limit(limit, value):
    content = measured_content()
    fitted = content["budget"][0]["fitted"].model_copy(update={"value": value})
    (row, *_) = report_of(content | {"budget": [content["budget"][0] | {"limit": limit, "fitted": fitted}]}).budget
    assert limit * (1 - row.headroom_percent / 100) == pytest.approx(value, rel=1e-6, abs=1e-9 * limit)
    assert (row.headroom_percent < 0) == (value > limit)


def test_a_limit_of_zero_has_no_headroom():
    content = measured_content()
    quality = content["budget"][2] | {"limit": 0.0, "status": "missed"}
    assert report_of(content | {"budget": [quality]}).budget[0].headroom_percent is None


def test_tokens_per_second_of_both_sides_with_source_and_turned_interval():
    report = report_of(measured_content() | {"workload": {"batch": 4, "prompt": 8, "context": 16}})
    decode, rate = report.fitted.performance.decode, report.tokens_per_second["fitted"]
    assert rate.value == pytest.approx(4000 / decode.value)
    assert rate.low == pytest.approx(4000 / decode.high)
    assert rate.high == pytest.approx(4000 / decode.low)
    assert (rate.unit, rate.source, rate.device) == ("tokens/s", "measured", decode.device)
    assert report_of(estimated_content()).tokens_per_second["dense"].source == "estimated"


@pytest.mark.parametrize(
    ("status", "quality_status", "ending", "outcome", "code", "code_if_measured_is_required"),
    [
        ("met", "met", "close", "met", 0, 4),
        ("met", "missed", "close", "missed", 3, 3),
        ("met", "noisy", "close", "uncertain", 3, 3),
        ("missed", "met", "candidates", "missed", 3, 3),
        ("missed", "met", "out_of_reach", "out_of_reach", 3, 3),
        ("noisy", "met", "out_of_reach", "noisy", 3, 3),
    ],
)
def test_outcome_and_exit_code(status, quality_status, ending, outcome, code, code_if_measured_is_required):
    content = estimated_content() | {"status": status, "quality_status": quality_status}
    report = report_of(content | {"search": content["search"] | {"ending": ending}})
    assert report.outcome == outcome
    assert (report.exit_code(), report.exit_code(require_measured=True)) == (code, code_if_measured_is_required)


def test_a_measured_verdict_passes_where_measurements_are_required():
    assert report_of(measured_content()).exit_code(require_measured=True) == 0


def test_the_document_is_up_to_date():
    assert DOCUMENT.read_text(encoding="utf-8") == schema_markdown(), REMEDY


def test_the_document_names_every_field_and_its_links_lead_somewhere():
    document = schema_markdown()
    schema = Report.model_json_schema()
    for model in (schema, *schema["$defs"].values()):
        assert all(f"| `{field}` |" in document for field in model["properties"])
    headings = {line[3:].lower() for line in document.splitlines() if line.startswith("## ")}
    links = {part.split(")")[0] for part in document.split("(#")[1:]}
    assert links
    assert links <= headings


def places(part: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of all parts of a document; of a list, which has parts of one kind, the first alone."""
    if path:
        yield path
    entries = part.items() if isinstance(part, dict) else enumerate(part[:1]) if isinstance(part, list) else ()
    for key, value in entries:
        yield from places(value, (*path, key))


def odd_values(value: Any, number: Iterator[Any]) -> tuple[Any, ...]:
    """What may stand where a value stood, from a file that another program wrote; ... is nothing at all.

    number: what may stand in a number's place.
    """
    if isinstance(value, dict):
        return (..., None, {}, {"x": 1})
    if isinstance(value, list):
        return (..., None, [])
    return (..., None) if isinstance(value, (bool, str)) else (..., None, next(number))


def odd_documents(document: dict[str, Any], parts: Sequence[str]) -> Iterator[tuple[str, Report]]:
    """Reports that one place's absence or another value makes, and that the schema still lets through: of each place
    one value, in turn with those of the places before it."""
    number = cycle((0, "Infinity", -1, "NaN"))
    chosen = [place for place in places(document) if place[0] in parts]
    for turn, (*way, last) in enumerate(chosen):
        values = odd_values(reduce(getitem, (*way, last), document), number)
        value, changed = values[turn % len(values)], copy.deepcopy(document)
        parent = reduce(getitem, way, changed)
        if value is not ...:
            parent[last] = value
        elif isinstance(parent, dict):
            del parent[last]
        with contextlib.suppress(ValidationError):
            report = Report.model_validate_json(json.dumps(changed))
            if json.loads(report.model_dump_json()) != document:
                yield f"{[*way, last]} = {value!r}", report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "parts", "least"),
    [(measured_content, tuple(Report.model_fields), 80), (pictures_content, ("workload", "quality", "experience"), 30)],
)
def test_what_the_schema_lets_through_can_be_shown(content, parts, least, monkeypatch):
    monkeypatch.setattr("edgeprune.report.svg.Plot.svg", lambda plot, name, label: "")  # most of the time
    tried = 0
    for change, report in odd_documents(json.loads(report_of(content()).model_dump_json()), parts):
        tried += 1
        try:
            render_html(report)
            print_report(report, Console(file=io.StringIO()))
            frontier_of([report])
            report.exit_code()
        except Exception as error:
            raise AssertionError(change) from error
    assert tried > least
