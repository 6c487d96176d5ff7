"""The commands that inspect: profiles, plans, findings as tables and documents, and a page written again."""

from __future__ import annotations

import json
import tomllib

import pytest
from typer.testing import CliRunner

from edgeprune.cli.app import app
from edgeprune.commands.doctor import Finding
from edgeprune.errors import InputError
from edgeprune.profiles import list_profiles, load_profile, load_profile_file
from tests.support.sample_reports import measured_content, report_of
from tests.support.small_bundles import write_report

CONFIG = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}


def printed(*words: object) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    if result.exception:
        raise result.exception
    return result.stdout


@pytest.mark.slow
def test_all_devices_or_one_as_a_table_and_as_a_document():
    names = [profile.name for profile in list_profiles()]
    assert [profile["name"] for profile in json.loads(printed("devices", "--json"))] == names
    assert all(name in printed("devices") for name in names)
    assert json.loads(printed("devices", "l4", "--json")) == load_profile("l4").model_dump(mode="json")
    assert "confidence" in printed("devices", "l4")
    with pytest.raises(InputError, match="unknown device 'toaster'"):
        printed("devices", "toaster")


def test_a_profiles_file_reads_back_equal(tmp_path):
    text = printed("devices", "jetson-orin", "--toml")
    assert tomllib.loads(text)["name"] == "jetson-orin"
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    assert load_profile_file(tmp_path / "mine.toml").hardware == load_profile("jetson-orin").hardware


def test_a_plan_of_one_device_is_that_of_all(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    every = json.loads(printed("plan", tmp_path, "--json"))
    assert every["model"] == tmp_path.name
    one = json.loads(printed("plan", tmp_path, "--device", "l4", "--json"))
    assert [plan for plan in every["devices"] if plan["device"] == "l4"] == [one]
    assert "All figures are estimated." in " ".join(printed("plan", tmp_path, "--device", "l4").split())
    assert "devices hold it" in printed("plan", tmp_path)


def test_findings_as_a_table_and_as_a_document(monkeypatch):
    findings = [Finding("torch", True, "2.13.0"), Finding("ssh", False, "not installed", "sudo apt install it")]
    monkeypatch.setattr("edgeprune.commands.doctor.examine", lambda: findings)
    assert json.loads(printed("doctor", "--json")) == [finding.as_json() for finding in findings]
    assert "sudo apt install it" in printed("doctor")


def test_the_page_that_was_written_again_is_named(tmp_path):
    bundle = write_report(tmp_path / "fitted", report_of(measured_content()))
    assert printed("report", bundle) == f"{bundle / 'report.html'}\n"
    assert "an old page" not in (bundle / "report.html").read_text()
