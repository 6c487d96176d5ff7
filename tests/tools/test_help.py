"""Every tool answers --help, and does nothing else then."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.support import ROOT

TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if 'if __name__ == "__main__":' in path.read_text())


def written() -> dict[Path, int]:
    """When the files were written that tools write."""
    files = [*(ROOT / "docs").rglob("*"), *(ROOT / "profiles").iterdir()]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_help_is_no_work(tool, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", [str(tool), "--help"])
    monkeypatch.chdir(tmp_path)
    before = written()
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tool), run_name="__main__")
    assert not ended.value.code
    assert "usage" in capsys.readouterr().out.lower()
    assert written() == before
    assert not list(tmp_path.iterdir())
