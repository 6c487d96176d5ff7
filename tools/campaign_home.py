"""The small random models and samples that tools/campaign.py tries things on, and the words of runs on them."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.checkpoints import save_llama
from tests.support.durations import durations
from tools.campaign_runs import Ended, Runs, Signal

TIMES = {
    "measure_seconds": 0.05,
    "survey_seconds": 0.02,
    "cross_check_seconds": 0.05,
    "warm_up_seconds": 0.01,
    "block_ms": 2,
}
SAMPLES = ("--calibration", "notes.txt", "--samples", "4", "--length", "24")
SMALL = (*SAMPLES, "--prompt", "8", "--context", "32", "--method", "magnitude", "--weights", "float,int8")
BUDGET = {"jetson-orin": ("--memory", "90%"), "cpu": ("--memory", "97%")}


class Home:
    """A folder with `model` and `notes.txt`, and room for one try at a time.

    Runs take place in a try's folder, by relative paths, with a cache of its own.
    """

    def __init__(self, folder: Path, runs: Runs, keep: bool = False) -> None:
        self.folder, self.runs, self.keep = folder, runs, keep
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.update(durations(**TIMES), HF_HUB_OFFLINE="1", COLUMNS="200", OMP_NUM_THREADS="1")
        self._tries = 0

    @functools.cached_property
    def model(self) -> Path:
        """A random language model that a Jetson's widths cut."""
        sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
        more = {"num_hidden_layers": 2, "intermediate_size": 512, "max_position_embeddings": 128}
        save_llama(self.folder / "model", **sizes, **more, initializer_range=0.05)
        return self.folder / "model"

    @functools.cached_property
    def notes(self) -> Path:
        """Samples of text."""
        lines = (f"the quick brown fox jumps over {number} lazy dogs and runs away " * 4 for number in range(40))
        (self.folder / "notes.txt").write_text("\n\n".join(lines), encoding="utf-8")
        return self.folder / "notes.txt"

    def begin(self) -> Path:
        """Returns the empty folder of a new try; the samples lie in it, and a link to the model."""
        self._tries += 1
        place = self.folder / f"try-{self._tries}"
        place.mkdir()
        (place / "model").symlink_to(self.model)
        shutil.copyfile(self.notes, place / "notes.txt")
        return place

    def end(self, place: Path, is_mishandled: bool) -> None:
        """Removes what a try left, but where it was mishandled and those are kept."""
        if not (self.keep and is_mishandled):
            shutil.rmtree(place, ignore_errors=True)
            _printed(place).unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the folder, but for tries that are kept."""
        for path in self.folder.iterdir():
            if not (self.keep and path.name.startswith("try-")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if any(self.folder.iterdir()):
            print(f"kept: {self.folder}")
        else:
            self.folder.rmdir()

    def run(
        self,
        words: Sequence[object],
        place: Path,
        cache: Path | None = None,
        path: str | None = None,
        before: Callable[[], None] = lambda: None,
        kill: Signal | None = None,
    ) -> Ended:
        """Returns how a run in a try's folder ended. cache: elsewhere than there; path: where ssh is."""
        variables = {"EDGEPRUNE_CACHE": str(cache or place / "cache"), "PATH": path or os.environ["PATH"]}
        ended = self.runs.run(words, place, variables, before, kill)
        with _printed(place).open("a", encoding="utf-8") as file:
            file.write(f"$ edgeprune {' '.join(ended.words)} -> {ended.code}\n{ended.output}{ended.errors}\n")
        return ended

    @functools.cached_property
    def bundle(self) -> Path:
        """A bundle of fit for this machine's processor."""
        return self._made(("fit", "model", "--device", "cpu", *BUDGET["cpu"], *SMALL), "of-cpu")

    @functools.cached_property
    def estimated(self) -> Path:
        """A bundle of fit for a Jetson."""
        return self._made(("fit", "model", "--device", "jetson-orin", *BUDGET["jetson-orin"], *SMALL), "of-jetson")

    @functools.cached_property
    def ladder(self) -> Path:
        """A bundle of frontier for a Jetson."""
        return self._made(("frontier", "model", "--device", "jetson-orin", "--rungs", "2", *SMALL), "ladder")

    @functools.cached_property
    def warm_cache(self) -> Path:
        """A cache that holds all that runs on this machine's processor look up."""
        return self.bundle.with_name("of-cpu.cache")

    def _made(self, words: Sequence[object], name: str) -> Path:
        place, output = self.begin(), self.folder / name
        ended = self.run((*words, "--output", output), place)
        if ended.code not in (0, 3):
            raise SystemExit(f"the run that the others are compared to failed:\n{ended.output}{ended.errors}")
        (place / "cache").rename(self.folder / f"{name}.cache")
        self.end(place, False)
        return output


def _printed(place: Path) -> Path:
    """Returns the file, beside the folder of a try, of what its runs printed."""
    return place.with_name(f"{place.name}.txt")
