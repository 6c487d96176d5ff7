"""The table of recovery says what was measured."""

from tests.support import DOCS
from tools.pages import filled
from tools.quality import read_cells
from tools.recovery import WRITERS, RecoveryCell, recovery_table


def cell(steps: int, rise: float, **more: float) -> tuple[str, dict]:
    rises = {"speeches": (rise, rise - 0.01, rise + 0.01), "handbook": (2 * rise, rise, 3 * rise)}
    return RecoveryCell(0.3, None, steps).key, {"rise": rises, **more}


def test_a_training_is_compared_with_the_same_model_before_it():
    trained = {"before": 0.61, "after": 0.42, "cpu_seconds": 660.0, "peak_bytes": 3 << 30}
    rows = recovery_table(dict([cell(0, 0.6), cell(60, 0.45, **trained)])).splitlines()
    assert rows[2] == "| 30 % | 0 | 0.600 [0.590, 0.610] | 1.200 [0.600, 1.800] |  |  |  |"
    assert rows[3] == (
        "| 30 % | 60 | 0.450 [0.440, 0.460], 25 % won back | 0.900 [0.450, 1.350], 25 % won back "
        "| 0.610 to 0.420 | 11 | 3.0 GiB |"
    )
    assert recovery_table(dict([cell(60, 0.45, **trained)])) == ""  # of what was it won back?


def test_the_table_is_that_of_the_figures_beside_it():
    page = (DOCS / "quality.md").read_text(encoding="utf-8")
    cells = read_cells(DOCS / "recovery.jsonl")
    assert all(f"<!-- {name} -->" in page for name in WRITERS)
    assert filled(page, {name: write(cells) for name, write in WRITERS.items()}) == page
