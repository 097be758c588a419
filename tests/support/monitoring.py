# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""scripts/deploy/monitoring as data: its alerts, the dashboard's panels, and the metrics that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

MONITORING = Path(__file__).parents[2] / "scripts" / "deploy" / "monitoring"

ALERTS: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"] for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

_LABELS = re.compile(r"\{[^}]*\}|\b(?:by|without|on|ignoring)\s*\([^)]*\)")  # of a selector, or of an operator
_METRIC = re.compile(r"\b(?:lora|nv|tritonlora)_\w+")


def expressions() -> list[str]:
    """The queries of all alerts, panels and variables, with the dashboard's variables filled in."""
    queries = [alert["expr"] for alert in ALERTS]
    queries += [target["expr"] for panel in PANELS for target in panel["targets"]]
    variables = [one["query"]["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
    queries += [re.sub(r"label_values\((.*), \w+\)", r"\1", one) for one in variables]
    return [re.sub(r"\$\w+", ".*", query.replace("$__rate_interval", "5m")) for query in queries]


def metric_names() -> set[str]:
    """The names of the series in `expressions`."""
    return {name for query in expressions() for name in _METRIC.findall(_LABELS.sub("", query))}
