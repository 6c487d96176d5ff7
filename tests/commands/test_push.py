"""A checkpoint sent to a hub: the hub's own client against a server of this process."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgeprune.cli.app import app
from edgeprune.commands.push import push
from edgeprune.errors import EngineError, InputError
from edgeprune.progress import Silent
from tests.support.sample_reports import measured_content, report_of
from tests.support.small_bundles import write_checkpoint, write_report

FILES = {"README.md": b"---\nlicense: mit\n---\n", "config.json": b"{}", "model.safetensors": bytes(range(200)) * 50}
TOKEN = "hf_secret"


class Hub:
    """A double of the hub: one user, repositories with their files, and every request that it got."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.refusal: int | None = None
        self.address = ""

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, dict | list]:
        self.requests.append((method, path))
        if self.refusal is not None or token != f"Bearer {TOKEN}":
            return self.refusal or 401, {"error": "not you"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("visibility") == "private" or asked.get(
                "private", False
            )  # newer clients and older ones
            self.repositories.setdefault(name, {"private": private, "files": {}, "commits": 0})
            return 200, {"url": f"{self.address}/{name}", "name": name}
        if path.endswith(".git/info/lfs/objects/batch"):
            actions = [
                one | {"actions": {"upload": {"href": f"{self.address}/blobs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return 200, {"objects": actions, "transfer": "basic"}
        if method == "PUT":
            assert hashlib.sha256(body).hexdigest() == path.rsplit("/", 1)[1]
            self.blobs[path.rsplit("/", 1)[1]] = body
            return 200, {}
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if name not in self.repositories:
            return 404, {"error": "no such repository"}
        return self._of_repository(name, path, body)

    def _of_repository(self, name: str, path: str, body: bytes) -> tuple[int, dict | list]:
        repository = self.repositories[name]
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            large = [file["path"] for file in files if file["path"].endswith(".safetensors")]
            modes = {file["path"]: "lfs" if file["path"] in large else "regular" for file in files}
            return 200, {
                "files": [{"path": at, "uploadMode": mode, "shouldIgnore": False} for at, mode in modes.items()]
            }
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repository["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repository["files"][value["path"]] = self.blobs[value["oid"]]
            repository["commits"] += 1
            return 200, {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1" * 40}
        return 200, {"id": name, "sha": "0" * 40, "private": repository["private"], "siblings": []}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    double = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            path = self.path.partition("?")[0]
            status, content = double.answer(
                self.command, path, self.rfile.read(length), self.headers.get("Authorization", f"Bearer {TOKEN}")
            )
            data = json.dumps(content).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(data)))):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_PUT = do_GET

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    double.address = f"http://127.0.0.1:{server.server_port}"
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", double.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # whose store no double speaks
    yield double
    server.shutdown()
    server.server_close()


@pytest.fixture
def bundle(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "bundle", report_of(measured_content()), FILES)


def test_the_checkpoint_arrives_in_one_commit_and_nothing_else_does(hub, bundle):
    done = push(bundle, "me/small", False, False, Silent())
    repository = hub.repositories["me/small"]
    assert (repository["files"], repository["commits"], repository["private"]) == (FILES, 1, True)
    assert (done.files, done.is_new) == ({name: len(data) for name, data in FILES.items()}, True)
    assert done.url == f"{hub.address}/me/small/commit/1"


def test_a_repository_that_is_there_is_written_again(hub, bundle):
    push(bundle, "me/small", True, False, Silent())
    assert not push(bundle, "me/small", False, False, Silent()).is_new
    assert (hub.repositories["me/small"]["commits"], hub.repositories["me/small"]["private"]) == (2, False)


def test_a_dry_run_changes_nothing(hub, bundle):
    result = CliRunner().invoke(app, ["push", str(bundle), "me/small", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "Would send to a new repository for its owner alone, me/small: 3 files" in result.stdout
    assert "model.safetensors" in result.stdout
    assert not hub.repositories
    assert {method for method, _ in hub.requests} == {"GET"}


def test_the_document_is_the_run(hub, bundle):
    result = CliRunner().invoke(app, ["push", str(bundle), "me/small", "--public", "--json"])
    told = json.loads(result.stdout)
    assert (told["repository"], told["public"], sorted(told["files"])) == ("me/small", True, sorted(FILES))
    assert not hub.repositories["me/small"]["private"]
    assert TOKEN not in result.output


def test_a_token_that_may_not_write_is_one_message_without_it(hub, bundle):
    hub.refusal = 403
    with pytest.raises(InputError, match="the hub refuses me/small") as caught:
        push(bundle, "me/small", False, False, Silent())
    assert TOKEN not in caught.value.message + caught.value.remedy
    assert "hf auth login" in caught.value.remedy


def test_a_hub_that_fails_is_an_error_of_the_engines_kind(hub, bundle):
    hub.refusal = 400
    with pytest.raises(EngineError, match="the hub failed"):
        push(bundle, "me/small", False, False, Silent())


def test_without_a_token_nothing_is_asked(hub, bundle, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match="there is no token"):
        push(bundle, "me/small", False, False, Silent())
    assert not hub.requests


@pytest.mark.parametrize("name", ["small", "a/b/c", "me/small.git", "me/-x", "../x", ""])
def test_a_name_that_is_none_is_refused_before_anything_is_asked(hub, bundle, name):
    with pytest.raises(InputError, match="is no repository"):
        push(bundle, name, False, False, Silent())
    assert not hub.requests


def test_a_bundle_without_a_checkpoint_or_with_a_changed_file_is_refused(hub, bundle, tmp_path):
    other = write_report(tmp_path / "other", report_of(measured_content()))
    with pytest.raises(InputError):
        push(other, "me/small", False, False, Silent())
    (bundle / "rungs" / "0" / "model" / "config.json").write_bytes(b"[]")
    with pytest.raises(InputError, match="sha256 differs"):
        push(bundle, "me/small", False, False, Silent())
    assert not hub.requests
