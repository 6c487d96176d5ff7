"""A bundle of one rung and few small texts."""

import json

from edgeprune.bundle.store import write_bundle


def write(tmp_path, output, text="one", render=lambda files: {"report.json": json.dumps(files)}):
    rung = tmp_path / "rung"
    (rung / "onnx").mkdir(parents=True, exist_ok=True)
    (rung / "onnx" / "model.onnx").unlink(missing_ok=True)  # a bundle may share the file
    (rung / "onnx" / "model.onnx").write_text(text)
    (tmp_path / "tokenizer.json").write_text("{}")
    write_bundle(
        tmp_path / "staging",
        output,
        [rung],
        {"tokenizer.json": tmp_path / "tokenizer.json"},
        {"README.md": "read"},
        {"edgeprune": "0.1", "seed": 0},
        render,
    )
