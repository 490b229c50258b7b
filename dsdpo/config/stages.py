"""The training stages by name. A stage is a row here and an objective in `dsdpo.objectives.stages`."""

from __future__ import annotations

# stage -> what it trains, for `--help`
STAGES: dict[str, str] = {"dpo": "direct preference optimization on pairs of answers"}
