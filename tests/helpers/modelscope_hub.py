"""ModelScope's HTTP interface, as far as its client asks it for models and data sets, served on this machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlparse

from tests.helpers.http_server import Handler, serving

Files = dict[str, bytes]


def files_of(folder: Path) -> Files:
    """The files of a folder by path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class ModelScope:
    """What the hub holds, and what it was asked for.

    Attributes:
        url: for MODELSCOPE_ENDPOINT.
        repositories: `models/org/name` or `datasets/org/name` -> revision -> files.
        asked: paths of all requests; `asked_files`: the files among them.
        missing: files that are listed, and answered with 404.
        status: that every request is answered with; 0: as the repositories say; -1: the connection is closed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[str, dict[str, Files]] = {}
        self.asked: list[str] = []
        self.asked_files: list[str] = []
        self.missing: set[str] = set()
        self.status = 0

    def answer(self, target: str) -> tuple[int, bytes]:
        """Status and body of a GET."""
        url = urlparse(target)
        path, query = url.path, {key: values[0] for key, values in parse_qs(url.query).items()}
        self.asked.append(path)
        parts = path.removeprefix("/api/v1/").split("/")
        if parts[0] not in ("models", "datasets"):
            return 404, b"{}"  # it asks for its region
        kind, org, name, *rest = parts
        revisions = self.repositories.get(f"{kind}/{org}/{name}")
        if revisions is None:
            return 404, json.dumps({"Code": 10010205001, "Message": "no such repository"}).encode()
        if rest == ["revisions"]:
            branches = [{"Revision": revision} for revision in revisions]
            return 200, _data({"RevisionMap": {"Branches": branches, "Tags": []}})
        files = revisions.get(query.get("Revision", "master"))
        if files is None:
            return 404, json.dumps({"Code": 10010205002, "Message": "no such revision"}).encode()
        if rest in (["repo", "files"], ["repo", "tree"]):
            return 200, _data({"Files": [_entry(file, content) for file, content in files.items()]})
        self.asked_files.append(query["FilePath"])
        if query["FilePath"] in self.missing:
            return 404, b"{}"
        return 200, files[query["FilePath"]]


def _data(content: object) -> bytes:
    return json.dumps({"Code": 200, "Success": True, "Data": content}).encode()


def _entry(path: str, content: bytes) -> dict[str, object]:
    digest = hashlib.sha256(content).hexdigest()
    return {"Path": path, "Name": Path(path).name, "Type": "blob", "Size": len(content), "Sha256": digest}


@contextmanager
def modelscope_hub() -> Iterator[ModelScope]:
    """A hub that is served inside the context."""

    class Answering(Handler):
        def do_GET(self) -> None:
            if hub.status == -1:
                self.connection.close()
                return
            status, body = (hub.status, b"{}") if hub.status else hub.answer(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

    with serving(Answering) as url:
        hub = ModelScope(url)
        yield hub
