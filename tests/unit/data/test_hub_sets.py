"""A hub that answers with each status, served on this machine and asked through `datasets` itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest

from tests.helpers.http_server import Handler, serving

_ASK = """
import json, sys, time
from pathlib import Path
from dsdpo.data.hub_sets import load_hub
from dsdpo.data.registry import DatasetEntry
from dsdpo.errors import DsdpoError
time.sleep = lambda seconds: None  # between tries
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = len(load_hub(DatasetEntry(name, Path.cwd(), hub_id=name)))
    except DsdpoError as error:
        found[name] = error.exit_code
print(json.dumps(found))
"""


class _Hub(Handler):
    """Answers every request for org/STATUS with that status; `gone` closes the connection."""

    asked: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        parts = self.path.replace("?", "/").split("/")
        name = parts[parts.index("org") + 1] if "org" in parts else "404"
        self.asked[name] += 1
        if name == "gone":
            self.connection.close()
            return
        self.send_response(int(name.split("-")[0]))
        if name == "403-gated":
            self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET


def ask(endpoint: str, cache: Path, *names: str, offline: str = "0") -> dict[str, int]:
    """Repository -> its number of records, or an exit code."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": offline}
    environment |= {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_TOKEN": "none", "NO_PROXY": "*"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", _ASK, *(f"org/{name}" for name in names)]
    done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 0, done.stderr
    return {name.removeprefix("org/"): said for name, said in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.start
def test_what_the_hub_answers_decides(tmp_path: Path) -> None:
    """What stays is 64 at once, and what may pass is asked again, and 74 in the end."""
    with serving(_Hub) as endpoint:
        found = ask(endpoint, tmp_path, "401", "403-gated", "403", "404", "503", "gone")
        assert found == {"401": 64, "403-gated": 64, "403": 64, "404": 64, "503": 74, "gone": 74}
        assert _Hub.asked["503"] >= 4 and _Hub.asked["gone"] >= 4
        assert ask(endpoint, tmp_path, "404", "other", offline="1") == {"404": 64, "other": 64}
        assert "other" not in _Hub.asked
