import sys

import pytest

from edgeprune.errors import InputError
from edgeprune.pipeline.task_scores import load_tasks
from tests.support.questions import write_questions


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        load_tasks(str(tmp_path / "other.jsonl"), print)


def test_a_missing_harness_is_one_message(tmp_path, monkeypatch):
    write_questions(tmp_path / "own.jsonl")
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval" or name.endswith("evaluate.harness")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match="not installed") as caught:
        load_tasks(str(tmp_path / "own.jsonl"), print)
    assert "edgeprune[eval]" in caught.value.remedy
