"""A hub that answers with each status, served on this machine and asked through huggingface_hub itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tests.helpers.http_server import Handler, serving

_CONFIG = json.dumps({"model_type": "llama"}).encode()
_ASK = """
import json, sys, time
from dsdpo.config.hubs import ModelSource
from dsdpo.errors import IOFailure
from dsdpo.model import hub
time.sleep = lambda seconds: None  # between tries
found = {}
for name in sys.argv[1:]:
    try:
        name, _, revision = name.partition("@")
        source = ModelSource(name, "huggingface", revision or None)
        folder, problems = hub.fetch_config(source, "model_name_or_path")
        found[name] = [problem.code for problem in problems] or (folder / "config.json").read_text()
    except IOFailure as error:
        found[name] = error.exit_code
print(json.dumps(found))
assert not {"torch", "transformers"} & sys.modules.keys()
"""


class _Hub(Handler):
    """Answers as the name of the repository says: 404, 503-twice, slow the first time, gone, ok."""

    asked: ClassVar[Counter[str]] = Counter()

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        name = self.path.split("/")[2] if self.path.startswith("/org/") else "404"
        self.asked[name] += 1
        if name == "gone":
            self.connection.close()
            return
        if name == "slow" and self.asked[name] == 1:
            time.sleep(1.3)
        status = 200 if name in ("ok", "slow") else int(name.split("-")[0])
        if name == "503-twice" and self.asked[name] > 2:
            status = 200
        self.send_response(status)
        if name == "403-gated":
            self.send_header("X-Error-Code", "GatedRepo")
        if name == "404-entry":
            self.send_header("X-Error-Code", "EntryNotFound")
        if status == 200:
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(_CONFIG) if status == 200 else 0))
        self.end_headers()
        if body and status == 200:
            self.wfile.write(_CONFIG)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with serving(_Hub) as url:
        yield url


def ask(hub: str, cache: Path, *names: str, offline: str = "0") -> dict[str, object]:
    """Repository -> what config.json holds, the codes of problems, or an exit code."""
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(cache), "HF_HUB_OFFLINE": offline}
    environment |= {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_TOKEN": "none", "NO_PROXY": "*"}
    command = [sys.executable, "-c", _ASK, *(f"org/{name}" for name in names)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return {name.removeprefix("org/"): said for name, said in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.start
def test_what_the_hub_answers_decides(hub: str, tmp_path: Path) -> None:
    """What stays is 64 at once, what may pass is asked again, and 74 in the end; a cache needs no answer."""
    names = ["401", "403-gated", "403", "404", "404-entry", "503-twice", "503", "gone", "slow", "ok"]
    found = ask(hub, tmp_path, *names)
    assert found == {
        **{name: ["hub"] for name in names[:5]},
        "503-twice": _CONFIG.decode(),
        "503": 74,
        "gone": 74,
        "slow": _CONFIG.decode(),
        "ok": _CONFIG.decode(),
    }
    assert _Hub.asked["401"] <= 2 and _Hub.asked["404"] <= 2 and _Hub.asked["503"] >= 4
    assert ask(hub, tmp_path, "ok", "other", offline="1") == {"ok": _CONFIG.decode(), "other": ["hub"]}
