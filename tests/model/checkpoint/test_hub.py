"""The hub's own client against a server of this process, and against caches as it lays them out."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file

from edgeprune.errors import InputError
from edgeprune.model.load import load_model, load_shape
from edgeprune.model.save import save_checkpoint
from tests.support import ROOT
from tests.support.checkpoints import save_llama
from tests.support.quantised import INT8, assert_stored
from tests.support.roundings import rounded

SHA = "0123456789abcdef0123456789abcdef01234567"
OTHER = {
    "consolidated.safetensors": b"x",
    "consolidated.00.pth": b"x",
    "original/params.json": b"{}",
    "model.bin": b"x",
    "training_args.bin": b"x",
    "adapter_model.safetensors": b"x",
    "onnx/config.json": b"{}",
    "onnx/model.safetensors": b"x",
    "code.py": b"raise SystemExit",
    "tf_model.h5": b"x",
    "flax_model.msgpack": b"x",
}


class Hub:
    """The hub's answers for one repository, and what was asked for.

    files: by their paths; refusal: status and error code of every answer, or of the files alone.
    """

    def __init__(self, files, refusal=None, refuses_files=None):
        self.files, self.refusal, self.refuses_files = files, refusal, refuses_files
        self.fetched = []

    def answer(self, path):
        """Status, headers and content."""
        if self.refusal is not None:
            return self.refusal[0], {"X-Error-Code": self.refusal[1]}, b"{}"
        if path.startswith("/api/models/someone/tiny/tree"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{hash(name) & 0xFFFFFFFF:040x}"}
                for name, content in self.files.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
        if path.startswith("/api/models/someone/tiny"):
            about = {"id": "someone/tiny", "sha": SHA, "siblings": [{"rfilename": name} for name in self.files]}
            return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()
        name = path.partition(f"/someone/tiny/resolve/{SHA}/")[2]
        if name not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        if self.refuses_files is not None and name != "config.json":
            return self.refuses_files[0], {"X-Error-Code": self.refuses_files[1]}, b""
        headers = {"X-Repo-Commit": SHA, "ETag": f'"{hash(name) & 0xFFFFFFFF:040x}"', "Accept-Ranges": "bytes"}
        return 200, headers, self.files[name]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The client's cache, and no token of this user's."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


@pytest.fixture
def serve(cache, monkeypatch):
    """hub -> the client asks it alone, until the test ends."""
    servers = []

    def start(hub):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path.partition("?")[0]
                status, headers, content = hub.answer(path)
                if self.command == "GET" and "/resolve/" in path:
                    hub.fetched.append(path.partition(f"/{SHA}/")[2])
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            do_HEAD = do_GET

            def log_message(self, *words):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        _point_at(monkeypatch, server.server_port)
        return hub

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _point_at(monkeypatch, port):
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def _closed_port():
    """A port where nobody answers."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def _files(folder, dtype=torch.float32):
    save_llama(folder, dtype)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _as_pickle(files, folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    return {name: content for name, content in files.items() if name != "model.safetensors"} | {
        "pytorch_model.bin": (folder / "pytorch_model.bin").read_bytes()
    }


def _fill(cache, folder):
    """What the client leaves behind: blobs are left out, their links are files here."""
    repository = cache / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(SHA)
    shutil.copytree(folder, repository / "snapshots" / SHA)


def test_only_what_is_needed_is_downloaded(serve, tmp_path):
    """Of a repository that holds its weights in many formats; afterwards the cache is enough."""
    files = _files(tmp_path / "model")
    both = _as_pickle(files, tmp_path / "model") | files | {"tokenizer.model": b"x", "chat_template.jinja": b"hi"}
    hub = serve(Hub(both | OTHER))
    model = load_model("someone/tiny")
    expected = set(both) - {"pytorch_model.bin"} | {"adapter_model.safetensors"}
    assert (model.name, set(hub.fetched)) == ("tiny", expected)
    assert {str(path.relative_to(model.directory)) for path in model.directory.rglob("*")} == expected
    hub.refusal = (503, "")
    assert load_model("someone/tiny").fingerprint == model.fingerprint


def test_the_scales_of_an_embedding_are_fetched_with_the_weights(serve, tmp_path):
    _files(tmp_path / "dense")
    dense = load_model(str(tmp_path / "dense"))
    decoder = dense.decoder.with_format(INT8, INT8)
    weights = rounded(decoder, dense.weights)
    save_checkpoint(decoder, weights.items(), dense, tmp_path / "model")
    serve(Hub({file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}))
    assert_stored(load_model("someone/tiny"), decoder, weights)


def test_pickles_are_fetched_where_there_is_nothing_else(serve, tmp_path):
    files = _files(tmp_path / "model")
    hub = serve(Hub(_as_pickle(files, tmp_path / "model") | OTHER))
    weights = load_model("someone/tiny").weights
    assert "pytorch_model.bin" in hub.fetched
    assert not set(OTHER) & set(hub.fetched)
    assert torch.equal(weights["embedding"], load_model(str(tmp_path / "model")).weights["embedding"])


def test_what_is_not_supported_is_refused_before_its_weights_are_fetched(serve, tmp_path):
    files = _files(tmp_path / "model")
    hub = serve(Hub(files | {"config.json": b'{"model_type": "mamba"}'}))
    with pytest.raises(InputError, match="unsupported architecture 'mamba'"):
        load_model("someone/tiny")
    assert hub.fetched == ["config.json"]


def test_a_repository_without_weights_is_said(serve, tmp_path):
    config = _files(tmp_path / "model")["config.json"]
    hub = serve(Hub({"config.json": config, "tiny-Q4_0.gguf": b"x", "training_args.bin": b"x"}))
    with pytest.raises(InputError, match="neither safetensors nor") as caught:
        load_model("someone/tiny")
    assert ".gguf" in caught.value.remedy
    assert hub.fetched == ["config.json"]
    assert load_shape("someone/tiny")[0] == "tiny"


@pytest.mark.parametrize("offline", [True, False], ids=["HF_HUB_OFFLINE", "no network"])
def test_a_model_in_the_cache_needs_no_network(cache, tmp_path, monkeypatch, offline):
    _files(tmp_path / "model")
    _fill(cache, tmp_path / "model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    with _closed_port() as port:
        _point_at(monkeypatch, port)
        model = load_model("someone/tiny")
        assert load_shape("someone/tiny") == ("tiny", model.decoder)
    assert model.directory == cache / "models--someone--tiny" / "snapshots" / SHA
    assert model.fingerprint == load_model(str(tmp_path / "model")).fingerprint


@pytest.mark.parametrize("offline", [True, False], ids=["HF_HUB_OFFLINE", "no network"])
def test_a_cache_with_the_configuration_alone_is_said(cache, tmp_path, monkeypatch, offline):
    """What `plan` fetches."""
    config = _files(tmp_path / "model")["config.json"]
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_bytes(config)
    _fill(cache, tmp_path / "small")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    with _closed_port() as port:
        _point_at(monkeypatch, port)
        assert load_shape("someone/tiny")[0] == "tiny"
        with pytest.raises(InputError, match="its weights are not in the hub's cache"):
            load_model("someone/tiny")


GATED, MISSING = (403, "GatedRepo"), (401, "RepoNotFound")
REFUSALS = {
    "gated": ({"refusal": GATED}, "is gated", "huggingface.co/someone/tiny and log in with `hf auth login`"),
    "gated files": ({"refuses_files": GATED}, "is gated", "Ask for access"),
    "missing or private": ({"refusal": MISSING}, "no model someone/tiny, or it is private", "hf auth login"),
    "a wrong token": ({"refusal": (401, "")}, "refuses|no model", "hf auth login"),
    "an overloaded hub": ({"refusal": (503, "")}, "the hub refuses someone/tiny: .*503", "Try again later"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("how", "reason", "remedy"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_names_what_to_do(serve, tmp_path, how, reason, remedy):
    serve(Hub(_files(tmp_path / "model"), **how))
    with pytest.raises(InputError, match=reason) as caught:
        load_model("someone/tiny")
    assert remedy in caught.value.remedy
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("spec", ["some one/tiny", "a--b/c", "x/y.git"])
def test_a_name_that_is_no_hub_id_is_said(cache, spec):
    with pytest.raises(InputError, match="no such model"):
        load_model(spec)


@pytest.mark.slow
@pytest.mark.parametrize("offline", [True, False], ids=["HF_HUB_OFFLINE", "no network"])
def test_without_network_the_command_line_says_so_soon(tmp_path, offline):
    """A hub that accepts connections and never answers is the slowest there is; nothing is asked of it when offline."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = os.environ | {
            "HF_HOME": str(tmp_path),
            "HF_ENDPOINT": address,
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "300",
            "NO_PROXY": "*",
            "HF_HUB_OFFLINE": str(int(offline)),
        }
        result = subprocess.run(
            [sys.executable, "-m", "edgeprune.cli.app", "fit", "nobody/nothing", "--device", "jetson-orin"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            env=environment,
        )
    assert result.returncode == 2, result.stderr
    assert "cannot get nobody/nothing: it is not in the hub's cache" in result.stderr
    assert ("HF_HUB_OFFLINE is set" if offline else "cannot be reached: timed out") in result.stderr
    assert len(result.stderr.strip().splitlines()) < 5
    assert "Traceback" not in result.stderr
