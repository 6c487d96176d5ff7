"""Fleets on a real Ray: two nodes of which one is killed, the command line interrupted, and what is refused.

All tests of Ray stand in this file, so that one runs at a time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from edgeprune.commands import cluster as cluster_module
from edgeprune.commands.cluster import Cluster, Task
from edgeprune.commands.fit import fit
from edgeprune.commands.fleet import fleet, plan_fleet
from edgeprune.errors import EngineError, InputError
from edgeprune.files import read_json
from edgeprune.ondevice.bundle import MANIFEST
from edgeprune.report.fleet import Fleet
from tests.support import ROOT
from tests.support.commands import run
from tests.support.durations import durations
from tests.support.families import save_family

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.slow

OPTIONS = {"samples": 4, "length": 32, "prompt": 16, "context": 64, "weights": "float", "max_quality_loss": "off"}
BUDGETS = ("99%", "80%", "60%")


def write_fleet(folder: Path, *models: Path, budgets: tuple[str, ...] = BUDGETS, **more: object) -> Path:
    lines = ["[defaults]", *(f"{name} = {json.dumps(value)}" for name, value in (OPTIONS | more).items())]
    for model in models:
        lines += ["[[models]]", f"model = {json.dumps(str(model))}"]
    for budget in budgets:
        lines += ["[[targets]]", 'device = "jetson-orin"', f'decode = "{budget}"', f'name = "orin-{budget[:2]}"']
    path = folder / "fleet.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def content(bundle: Path) -> dict[str, str]:
    """The hashes of the files that hold no times, no paths and no figures of this machine."""
    hashes = read_json(bundle / MANIFEST)["sha256"]
    return {name: digest for name, digest in hashes.items() if "/onnx/" in name or "/model/" in name}


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name, value in durations(cross_check_seconds=0.1, probe_seconds=0.01).items():
        monkeypatch.setenv(name, value)


def test_a_killed_node_costs_nothing_but_time_and_the_bundles_are_those_of_single_fits(tmp_path, one_thread):
    from ray.cluster_utils import Cluster as Nodes

    models = [tmp_path / name for name in ("llama", "qwen3")]
    for model in models:
        save_family(model, model.name)
    file = write_fleet(tmp_path, *models)
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1})
    second = nodes.add_node(num_cpus=1)
    runs: dict[str, str] = {}  # of the cells that were under way when the node died

    def on_change(document: Fleet, running: dict[int, str]) -> None:
        begun = {index: stage for index, stage in running.items() if stage != "begins"}
        if runs or len(begun) < 2:
            return
        for index in begun:
            row = document.cells[index]
            journal = tmp_path / "out" / row.model / f"{row.target}.work" / "journal.jsonl"
            if not journal.is_file():
                runs.clear()
                return
            runs[f"{row.model}/{row.target}"] = json.loads(journal.read_text().splitlines()[0])["run"]
        nodes.remove_node(second, allow_graceful=False)

    try:
        result = fleet(file, output=tmp_path / "out", address=nodes.address, on_change=on_change)
    finally:
        nodes.shutdown()
    rows = result.report.cells
    assert len(rows) == 6
    assert [row.status for row in rows] == ["met"] * 6, [row.reason for row in rows]
    assert result.report.exit_code == 0
    assert not (tmp_path / "out" / "shared").exists()
    # What was under way went on from its journal.
    assert len(runs) == 2
    for name, run_id in runs.items():
        assert read_json(tmp_path / "out" / name / MANIFEST)["run"] == run_id
    # All cells are as fits by themselves make them.
    for row in rows:
        alone = tmp_path / "alone" / row.model / row.target
        budget = f"{row.target[-2:]}%"
        fit(tmp_path / row.model, device="jetson-orin", decode=budget, output=alone, **OPTIONS)
        assert content(alone) == content(tmp_path / "out" / row.bundle)
        assert len(content(alone)) > 5
    # The stages that they share were made once for each model: their files are one.
    for model in models:
        sketches = [
            tmp_path / "out" / row.bundle / "rungs" / "0" / "moments.npz" for row in rows if row.model == model.name
        ]
        assert len(sketches) == 3
        assert all(one.samefile(sketches[0]) for one in sketches)
    assert Fleet.model_validate_json((tmp_path / "out" / "fleet.json").read_text()).cells == rows


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "edgeprune.cli", *map(str, words)]


def left_running(mark: str) -> list[str]:
    """The programs whose environment holds a mark."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def test_an_interrupted_fleet_goes_on_with_resume_and_leaves_nothing_running(tmp_path, one_thread):
    save_family(tmp_path / "llama", "llama")
    file = write_fleet(tmp_path, tmp_path / "llama", budgets=("99%", "80%"))
    mark = uuid.uuid4().hex
    environment = os.environ | {"EDGEPRUNE_TEST_MARK": mark, "COLUMNS": "200"}
    program = subprocess.Popen(
        command("fleet", file, "--output", "out"),
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while not list((tmp_path / "out").glob("llama/*.work/journal.jsonl")):
        assert time.monotonic() < end and program.poll() is None
        time.sleep(0.02)
    program.send_signal(signal.SIGINT)
    _, errors = program.communicate(timeout=120)
    assert program.returncode == 130, errors
    assert "the same command goes on with --resume" in errors
    assert "Traceback" not in errors
    assert Fleet.model_validate_json((tmp_path / "out" / "fleet.json").read_text()).cells[0].exit_code is None
    # Without --resume nothing is touched.
    refused = run("fleet", file, "--output", tmp_path / "out")
    assert refused.returncode == 2 and "--resume" in refused.stderr
    again = subprocess.run(
        command("fleet", file, "--output", "out", "--resume", "--json"),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert again.returncode == 0, again.stderr
    document = Fleet.model_validate_json(again.stdout)
    assert [row.status for row in document.cells] == ["met", "met"]
    assert "llama on orin-99: " in again.stderr
    # It does not differ from itself, and from what is no fleet it cannot.
    same = run("diff", tmp_path / "out", tmp_path / "out", "--fail-on", "memory=0", "--json")
    assert same.returncode == 0, same.stderr
    assert [cell["first"] for cell in json.loads(same.stdout)["cells"]] == ["broken"] * 2
    shown = run("diff", tmp_path / "out", tmp_path / "out")
    assert "orin-99" in shown.stdout and "orin-80" in shown.stdout
    refused = run("diff", tmp_path / "out", tmp_path / "out" / document.cells[0].bundle)
    assert refused.returncode == 2 and "Give two fleets, or two bundles." in refused.stderr
    # What ended stays as it is, also where a row is damaged.
    (tmp_path / "out/llama/orin-99.options.json").write_text("{}")
    times = [(tmp_path / "out" / row.bundle / MANIFEST).stat().st_mtime_ns for row in document.cells]
    result = fleet(file, output=tmp_path / "out", resume=True)
    again, before = ([row.model_copy(update={"seconds": None}) for row in of.cells] for of in (result.report, document))
    assert again == before
    assert times == [(tmp_path / "out" / row.bundle / MANIFEST).stat().st_mtime_ns for row in document.cells]
    end = time.monotonic() + 30
    while left := left_running(mark):
        assert time.monotonic() < end, left
        time.sleep(0.2)


def fail_in_a_worker(on_stage: object) -> None:
    raise InputError("no", "Nothing.")


def end_the_worker(on_stage: object) -> None:
    os._exit(1)


def the_answer(on_stage: object) -> int:
    return 42


def test_a_task_that_fails_or_has_no_room_is_told_and_the_others_go_on(monkeypatch, one_thread, tmp_path):
    monkeypatch.setattr(cluster_module, "RETRIES", 1)
    tasks = [
        Task(the_answer, {}, 1, 1 << 20),
        Task(fail_in_a_worker, {}, 1, 1 << 20),
        Task(end_the_worker, {}, 1, 1 << 20),
        Task(the_answer, {}, None, 1 << 60),
        Task(the_answer, {}, None, 1 << 20),
    ]
    with Cluster(None) as cluster:
        with pytest.raises(EngineError, match="does not see"):
            cluster.check(tmp_path / "nothing" / "fleet.json")
        ended = {one.index: one for part, _ in cluster.run(tasks, 0.1) for one in part}
    assert ended.keys() == set(range(5))
    assert [ended[index].result for index in (0, 4)] == [42, 42]
    assert "no" in ended[1].reason
    assert ended[2].result is None and ended[2].reason
    assert "the largest node has" in ended[3].reason


def test_a_cluster_that_does_not_answer_is_one_message(tmp_path):
    save_family(tmp_path / "llama", "llama")
    file = write_fleet(tmp_path, tmp_path / "llama", budgets=("99%",))
    refused = run("fleet", file, "--output", tmp_path / "out", "--address", "127.0.0.1:1")
    assert refused.returncode == 4
    assert refused.stderr.startswith("error: Ray does not answer at 127.0.0.1:1")
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()
    for address in ("ray://x:1", "host", "host:many", ":5"):
        refused = run("fleet", file, "--output", tmp_path / "out", "--address", address)
        assert refused.returncode == 2 and "is not auto or HOST:PORT" in refused.stderr


def test_a_cell_that_cannot_be_fitted_is_a_row_with_its_reason(tmp_path, one_thread):
    save_family(tmp_path / "llama", "llama")
    save_family(tmp_path / "gpt2", "gpt2")
    (tmp_path / "gpt2" / "model.safetensors").write_bytes(b"damaged")
    file = write_fleet(tmp_path, tmp_path / "llama", tmp_path / "gpt2", budgets=("99%",))
    result = fleet(file, output=tmp_path / "out")
    met, failed = result.report.cells
    assert (met.status, failed.status, failed.exit_code) == ("met", None, 2)
    assert "safetensors" in failed.reason
    assert result.report.exit_code == 4
    assert (tmp_path / "out" / "shared").is_dir()  # for --resume
    assert "failed" in (tmp_path / "out" / "fleet.html").read_text()


def test_a_dry_run_shows_all_cells_and_starts_nothing(tmp_path):
    save_family(tmp_path / "llama", "llama")
    file = write_fleet(tmp_path, tmp_path / "llama", budgets=tuple(f"{percent}%" for percent in range(60, 100)))
    planned = plan_fleet(file).report
    assert len(planned) == 40
    shown = run("fleet", file, "--dry-run", "--json", cwd=tmp_path)
    cells = json.loads(shown.stdout)["cells"]
    assert len(cells) == 40
    assert all(
        cell["source"] == "estimated" and cell["memory_bytes"] > 1 << 20 and cell["seconds"] > 0 for cell in cells
    )
    assert not (tmp_path / "fleet-fleet").exists()
    told = run("fleet", file, "--dry-run", cwd=tmp_path).stdout
    assert "40 cells" in told and "estimated" in told
    refused = run("fleet", file, "--dry-run", "--resume")
    assert refused.returncode == 2 and "--dry-run starts nothing" in refused.stderr
