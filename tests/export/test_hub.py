"""Pushes of exports to a local server with the routes of the hub."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from lightning_distill.errors import ConfigurationError, RunError
from lightning_distill.export.hub import check_push, push

NAME = "owner/student"


class FakeHub(BaseHTTPRequestHandler):
    """The routes of a push: create a repository, its metadata, kinds of uploads, large files, and commits."""

    server: Any

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        """Metadata of a repository."""
        hub = self.server.state
        if self.path != f"/api/models/{NAME}" or "private" not in hub:
            self.answer({"error": "not found"}, 404)
            return
        self.answer({"id": NAME, "private": hub["private"], "sha": "0" * 40, "siblings": []})

    def do_PUT(self) -> None:
        """Content of a large file."""
        self.server.state["large"][self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        """All other requests."""
        hub, body = self.server.state, self.body()
        if self.headers["Authorization"] != "Bearer secret":
            self.answer({"error": "Invalid user token."}, 401)
        elif self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path == f"/api/models/{NAME}/preupload/main":
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif self.path == f"/{NAME}.git/info/lfs/objects/batch":
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub['url']}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self.answer({"objects": objects})
        elif self.path == f"/api/models/{NAME}/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub["files"][value["path"]] = hub["large"][value["oid"]]
            self.answer({"commitUrl": f"{hub['url']}/{NAME}/commit/1", "commitOid": "1" * 40})
        else:
            self.answer({"error": f"unknown route {self.path}"}, 500)

    def create(self, body: dict[str, Any]) -> None:
        """Create the repository; the address is in every answer."""
        hub = self.server.state
        if hub.get("forbidden"):
            self.answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
        elif "private" in hub:
            self.answer({"error": "You already created this model repo"}, 409)
        else:
            hub["private"] = body.get("visibility") == "private" or bool(body.get("private"))
            self.answer({"name": NAME})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content | {"url": f"{self.server.state['url']}/{NAME}"}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """State of a local server that huggingface_hub takes for the hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    url = f"http://127.0.0.1:{server.server_port}"
    server.state = {"url": url, "files": {}, "large": {}}  # type: ignore[attr-defined]
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.state  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A directory like an export."""
    directory = tmp_path / "student"
    (directory / "transformer").mkdir(parents=True)
    (directory / "README.md").write_text("---\nlibrary_name: diffusers\n---\n# Few-step student\n")
    (directory / "transformer" / "weights.safetensors").write_bytes(bytes(range(256)))
    return directory


@pytest.mark.parametrize("public", [False, True])
def test_all_files_arrive_in_a_new_repository(public: bool, hub: dict[str, Any], export: Path) -> None:
    check_push(NAME)
    assert push(export, NAME, public) == f"{hub['url']}/{NAME}"
    assert hub["private"] is not public
    expected = {path.relative_to(export).as_posix(): path.read_bytes() for path in export.rglob("*") if path.is_file()}
    assert hub["files"] == expected
    assert hashlib.sha256(bytes(range(256))).hexdigest() in hub["large"]


def test_an_export_replaces_files_of_a_repository_of_the_same_visibility(hub: dict[str, Any], export: Path) -> None:
    push(export, NAME)
    (export / "README.md").write_text("# Another\n")
    push(export, NAME)
    assert hub["files"]["README.md"] == b"# Another\n"
    for private, public, remedy in ((True, True, "private; set public to false"), (False, False, "public; set public to true")):
        hub["private"] = private
        with pytest.raises(RunError, match=f"'{NAME}' exists and is {remedy}"):
            push(export, NAME, public)


def test_refusals_are_one_line_and_keep_the_export(hub: dict[str, Any], export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(reason: str) -> None:
        with pytest.raises(RunError, match=reason) as caught:
            push(export, NAME)
        assert "\n" not in str(caught.value)
        assert f"run `hf upload {NAME} {export} . --private`" in str(caught.value)
        assert (export / "README.md").is_file()

    hub["forbidden"] = True
    check(r"\(403 Forbidden: You don't have the rights")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    check(r"\(401 Unauthorized")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    check("not pushed to")


def test_impossible_pushes_raise_before_the_export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("student", "a/b/c", "owner/two--dashes", "owner/.x", ""):
        with pytest.raises(
            ConfigurationError, match=rf"push_to_hub is '{re.escape(name)}' \(.*\); set it to owner/name"
        ) as caught:
            check_push(name)
        assert "\n" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ConfigurationError, match=r"there is no token of the hub; log in with `hf auth login`, or set HF_TOKEN"):
        check_push(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError, match="HF_HUB_OFFLINE is set; unset it"):
        check_push(NAME)
