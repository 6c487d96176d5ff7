"""The cache's folder: the environment's, else the user's."""

from __future__ import annotations

import sys

import pytest

from edgeprune.cache import cache_folder


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    assert not (tmp_path / "mine").exists()  # whoever writes there makes it


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is Linux's")
@pytest.mark.parametrize("named", [None, ""])
def test_else_it_is_the_users(tmp_path, monkeypatch, named):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("EDGEPRUNE_CACHE", raising=False)
    if named is not None:
        monkeypatch.setenv("EDGEPRUNE_CACHE", named)
    assert cache_folder() == tmp_path / "edgeprune"
