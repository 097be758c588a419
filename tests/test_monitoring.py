# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""scripts/deploy/monitoring: Prometheus and Grafana take it, and it asks for metrics that there are."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy_schemas import DASHBOARD as DASHBOARD_SCHEMA
from documentation import ROOT, Page
from monitoring import ALERTS, DASHBOARD, MONITORING, PANELS, expressions, metric_names
from tritonlora.openai.metrics import Metrics
from tritonlora.serving.metrics import FAMILIES

Document = dict[str, Any]


def promtool(*arguments: str | Path) -> str:
    """What Prometheus' own tool says. AssertionError when it finds something wrong."""
    program = shutil.which(Path(sys.executable).with_name("promtool")) or shutil.which("promtool")
    assert program, "there is no promtool; install Debian's package prometheus, or put Prometheus' promtool on PATH"
    done = subprocess.run([program, *arguments], text=True, capture_output=True, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout


def rules_of(queries: list[str]) -> str:
    """Queries as recording rules."""
    rules = [{"record": f"query_{number}", "expr": query} for number, query in enumerate(queries)]
    return str(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))


def test_prometheus_takes_the_scrape_config_and_the_rules() -> None:
    """The config names the rules."""
    assert f"SUCCESS: {len(ALERTS)} rules found" in promtool("check", "config", MONITORING / "prometheus.yml")


def test_the_rules_pass_their_tests(tmp_path: Path) -> None:
    """Every alert has one, which fails where the alert does not fire."""
    promtool("test", "rules", MONITORING / "rules_test.yaml")
    tested = {*re.findall(r'alertname="(\w+)"', (MONITORING / "rules_test.yaml").read_text())}

    assert {alert["alert"] for alert in ALERTS} == tested

    shutil.copytree(MONITORING, tmp_path / "never")
    never = re.sub(r"(alert: .*?\n\s+)for: \w+", r"\1for: 9h", (MONITORING / "rules.yaml").read_text(), flags=re.DOTALL)
    (tmp_path / "never" / "rules.yaml").write_text(never)
    with pytest.raises(AssertionError) as failed:
        promtool("test", "rules", tmp_path / "never" / "rules_test.yaml")
    assert tested == {*re.findall(r'alertname="(\w+)"', str(failed.value))}


def test_every_query_is_promql(tmp_path: Path) -> None:
    """Those of the dashboard, too, which Prometheus does not read."""
    (tmp_path / "rules.yaml").write_text(rules_of(expressions()))
    promtool("check", "rules", tmp_path / "rules.yaml")
    (tmp_path / "rules.yaml").write_text(rules_of(["sum(rate(lora_loads_total[5m])"]))

    with pytest.raises(AssertionError, match="unclosed left parenthesis"):
        promtool("check", "rules", tmp_path / "rules.yaml")


def test_every_alert_waits_and_says_what_to_do() -> None:
    """It names the page, and the part of it, that has more."""
    for alert in ALERTS:
        page, anchor = re.findall(r"(plugin/docs/[\w-]+\.md)#([\w-]+)$", alert["annotations"]["runbook"])[0]

        assert re.fullmatch(r"\d+m", alert["for"]), alert
        assert alert["labels"]["severity"] in ("warning", "critical"), alert
        assert alert["annotations"]["summary"].startswith("{{ $labels.instance }}: "), alert
        assert anchor in Page(ROOT / page).anchors, alert


def test_queries_have_labels_that_the_metrics_have() -> None:
    """Of the resolver's metrics. Prometheus finds nothing for others, and says nothing."""
    labels = {family.name: {*family.labels} for family in FAMILIES}
    selectors = [one for query in expressions() for one in re.findall(r"\b(lora_\w+)\{([^}]*)\}", query)]

    assert len(selectors) > 20
    for metric, matchers in selectors:
        name = metric.removesuffix("_bucket")
        assert {*re.findall(r"(\w+)[=!]", matchers)} <= labels[name] | {"instance"}, metric


def test_the_dashboard_has_panels_for_every_metric_that_is_kept() -> None:
    """All but those that other ones have in them."""
    shown = {name.removesuffix("_bucket") for name in metric_names() if name.startswith("lora_")}

    assert {family.name for family in FAMILIES} - {"lora_load_seconds_total", "lora_requests_info"} == shown


def test_the_door_has_the_metrics_that_are_asked_of_it() -> None:
    """In its own page of metrics, where a histogram has buckets."""
    page = Metrics().page().decode()
    wanted = {name.removesuffix("_bucket") for name in metric_names() if name.startswith("tritonlora_openai_")}

    assert 6 == len(wanted)
    assert wanted <= set(re.findall(r"^# TYPE (\w+) ", page, re.MULTILINE))


def validate(dashboard: Document) -> None:
    """Raises what Grafana's schema has against it; unknown fields are errors, and so are numbers that Grafana gives."""
    jsonschema.Draft202012Validator(DASHBOARD_SCHEMA).validate(dashboard)


def test_the_dashboard_is_what_grafana_takes() -> None:
    """Panels do not overlap, and each query is of the source of data that whoever looks has chosen."""
    validate(DASHBOARD)
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    sources = [panel["datasource"] for panel in PANELS] + [
        query["datasource"] for panel in PANELS for query in panel["targets"]
    ]

    assert len(cells) == len({*cells})
    assert max(x for x, _ in cells) < 24
    assert all({"type": "prometheus", "uid": "${datasource}"} == source for source in sources)
    assert len(PANELS) == len({panel["title"] for panel in PANELS})


def _id_of_a_panel(dashboard: Document) -> None:
    dashboard["panels"][1]["id"] = 7


def _source_of_one_grafana(dashboard: Document) -> None:
    dashboard["panels"][1]["datasource"]["uid"] = "PBFA97CFB590B2093"


def _misspelt_legend(dashboard: Document) -> None:
    dashboard["panels"][1]["targets"][0]["legend_format"] = dashboard["panels"][1]["targets"][0].pop("legendFormat")


def _panel_without_a_place(dashboard: Document) -> None:
    del dashboard["panels"][1]["gridPos"]


@pytest.mark.parametrize("change", [_id_of_a_panel, _source_of_one_grafana, _misspelt_legend, _panel_without_a_place])
def test_a_dashboard_with_a_mistake_is_refused(change: Callable[[Document], None]) -> None:
    """So that the test above means something."""
    dashboard = copy.deepcopy(DASHBOARD)
    change(dashboard)

    with pytest.raises(jsonschema.ValidationError):
        validate(dashboard)


def test_the_dashboard_is_written_as_grafana_exports_it() -> None:
    """So that a change in Grafana is a small change of the file."""
    assert json.dumps(DASHBOARD, indent=2, ensure_ascii=False) + "\n" == (MONITORING / "dashboard.json").read_text()
