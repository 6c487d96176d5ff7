"""One small bundle for all tests that finish one, by the real command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgeprune.ondevice.bundle import open_bundle, sha256
from tests.support.checkpoints import save_llama
from tests.support.commands import SMALL, run

_made: list[Path] = []  # one for all test files of a run


def fitted(factory: pytest.TempPathFactory) -> Path:
    """Two rungs for this machine's processor; whoever changes it, changes a copy."""
    if not _made:
        _made.append(_fit(factory))
    return _made[0]


def _fit(factory: pytest.TempPathFactory) -> Path:
    home = factory.mktemp("fitted")
    save_llama(
        home / "model",
        num_hidden_layers=2,
        hidden_size=768,
        num_attention_heads=12,
        head_dim=64,
        intermediate_size=768,
        initializer_range=0.05,
    )
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "away", "from"]
    paragraphs = [" ".join(words[(i * j) % len(words)] for j in range(1, 60)) + f" {i}" for i in range(40)]
    (home / "text.txt").write_text("\n\n".join(paragraphs))
    result = run(
        "fit",
        home / "model",
        "--device",
        "cpu",
        "--memory",
        "90%",
        "--rungs",
        "2",
        "--output",
        home / "bundle",
        "--calibration",
        home / "text.txt",
        "--method",
        "magnitude",
        *SMALL,
    )
    assert result.returncode in (0, 3), result.stderr
    assert len(deployment(home / "bundle")["rungs"]) == 2
    return home / "bundle"


def copy_of(bundle: Path, target: Path, limits: dict[str, float] | None = None) -> Path:
    """A copy to change, with other limits."""
    shutil.copytree(bundle, target, symlinks=True)
    if limits is not None:
        change(target, limits={name: {"value": value, "asked": str(value)} for name, value in limits.items()})
    return target


def change(bundle: Path, **values: object) -> None:
    """Other values in what finish.pyz needs to know."""
    rewrite(bundle, "deployment.json", json.dumps(deployment(bundle) | values).encode())


def rewrite(bundle: Path, name: str, data: bytes) -> None:
    """A file of the bundle, as if it had been made so."""
    (bundle / name).write_bytes(data)
    manifest = open_bundle(bundle)
    manifest["sha256"][name] = sha256(bundle / name)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def deployment(bundle: Path) -> dict:
    return json.loads((bundle / "deployment.json").read_text())


def contents(bundle: Path) -> dict[str, str]:
    """Every file and link with what is in it."""
    return {
        str(path.relative_to(bundle)): str(path.readlink()) if path.is_symlink() else sha256(path)
        for path in sorted(bundle.rglob("*"))
        if path.is_symlink() or path.is_file()
    }
