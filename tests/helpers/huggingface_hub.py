"""Hugging Face's HTTP interface, as far as its clients ask it for revisions of models and data sets, or upload some
files, served here."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote, urlparse

from tests.helpers.http_server import Handler, serving

Files = dict[str, bytes]
Answer = tuple[int, bytes, dict[str, str]]


def commit_of(files: Files) -> str:
    """The commit of a revision: a hash of its content."""
    digest = hashlib.sha1(usedforsecurity=False)
    for name, content in sorted(files.items()):
        digest.update(name.encode() + content)
    return digest.hexdigest()


class HuggingFace:
    """What the hub holds: `models/org/name` or `datasets/org/name` -> branch or tag -> files. url: for HF_ENDPOINT.

    `refuses` is the status that it has for each upload; None: it takes them.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[str, dict[str, Files]] = {}
        self.refuses: int | None = None

    def answer(self, target: str, body: bytes) -> Answer:
        """Status, body and headers."""
        parts = unquote(urlparse(target).path).strip("/").split("/")
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        if parts[0] in ("validate-yaml", "repos") or parts[3:4] in (["preupload"], ["commit"]):
            return self._upload(parts, body)
        if parts[0] not in ("models", "datasets"):
            parts = ["models", *parts]
        revisions = self.repositories.get("/".join(parts[:3]))
        action, revision, *path = [*parts[3:], "", ""] if len(parts) < 5 else parts[3:]
        if revisions is None:
            return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        by_name = {**revisions, **{commit_of(files): files for files in revisions.values()}}
        files = by_name.get(revision or "main")
        if files is None:
            return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
        return self._of_api("/".join(parts[1:3]), action, files, body) if is_api else _resolved("/".join(path), files)

    def _upload(self, parts: list[str], body: bytes) -> Answer:
        """Make a repository (of account `me`, where none is named), say how files come, take them in one commit."""
        if self.refuses is not None:
            return self.refuses, b"{}", {}
        if parts[0] == "validate-yaml":
            return 200, b"{}", {}
        if parts[0] == "repos":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repositories.setdefault(f"models/{name}", {"main": {}})
            return 200, json.dumps({"url": f"{self.url}/{name}"}).encode(), {}
        if parts[3] == "preupload":
            paths = [entry["path"] for entry in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            return 200, json.dumps({"files": modes}).encode(), {}
        files = self.repositories["/".join(parts[:3])]["main"]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        name = "/".join(parts[1:3])
        commit = {"commitOid": commit_of(files), "commitUrl": f"{self.url}/{name}/commit/{commit_of(files)}"}
        return 200, json.dumps({"success": True, **commit}).encode(), {}

    def _of_api(self, name: str, action: str, files: Files, body: bytes) -> Answer:
        listed = [{"type": "file", "path": path, "size": len(content)} for path, content in files.items()]
        listed = [entry | {"oid": _oid(files[str(entry["path"])])} for entry in listed]
        if action == "tree":
            return 200, json.dumps(listed).encode(), {}
        if action == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            return 200, json.dumps([entry for entry in listed if entry["path"] in asked]).encode(), {}
        found = {"id": name, "sha": commit_of(files), "siblings": [{"rfilename": path} for path in files]}
        return 200, json.dumps(found | {"private": False, "tags": [], "downloads": 0}).encode(), {}


def _resolved(path: str, files: Files) -> Answer:
    if path not in files:
        return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit_of(files)}
    return 200, files[path], {"X-Repo-Commit": commit_of(files), "ETag": f'"{_oid(files[path])}"'}


def _oid(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@contextmanager
def huggingface_hub() -> Iterator[HuggingFace]:
    """A hub that is served inside the context."""

    class Answering(Handler):
        def do_GET(self) -> None:
            status, body, headers = hub.answer(self.path, self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_POST = do_GET

    with serving(Answering) as url:
        hub = HuggingFace(url)
        yield hub
