"""What a checkup is asked for, and what of it goes into a report of a bug."""

from __future__ import annotations

import json

import pytest

from edgeprune.commands import checkup as module
from edgeprune.commands.checkup import as_json, checkup
from edgeprune.engine.checks import Check
from edgeprune.engine.checkup import Checkup
from edgeprune.errors import InputError

WHERE = "ssh://jane@orin:22"


def test_a_report_of_a_bug_has_versions_and_no_users_name() -> None:
    details = (
        f"{WHERE} did not answer",
        "/home/jane/.cache/edgeprune is full",
        "/Users/jane/x and /root/y",
        "see '/home/jane'",
    )
    checks = [Check(str(index), "failed", text, "Do.", 1.0) for index, text in enumerate(details)]
    document = as_json(Checkup(WHERE, "cpu", "onnxruntime", {"python": "3.10", "modules": {}}, checks, 2.0))
    text = json.dumps(document)
    assert "jane" not in text
    assert "/root" not in text
    assert document["where"] == "ssh://orin:22"
    assert [check["detail"] for check in document["checks"]][1:] == [
        "~/.cache/edgeprune is full",
        "~/x and ~/y",
        "see '~'",
    ]
    assert document["device"]["python"] == "3.10"
    assert (document["failed"], document["passed"]) == (4, 0)
    assert document["edgeprune"]


@pytest.mark.parametrize(
    "asked", [{"target": "orin"}, {"device": "toaster"}, {"model": "6 apples"}, {"device": "l4", "profile": "x.toml"}]
)
def test_a_slip_is_refused_before_anything_is_reached(asked: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(module, "check_device", reached)
    with pytest.raises(InputError):
        checkup(**asked)
