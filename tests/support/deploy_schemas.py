# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""JSON schemas of the custom resources and of the dashboard in scripts/deploy, for which no package here has any.

Each is written after the definition that it names, narrowed to the fields that scripts/deploy uses, and closed: a field
that is not listed is an error, whether upstream knows it or not.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _closed(properties: Schema, *required: str) -> Schema:
    """An object with these properties and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _list(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def _resource(api_version: str, kind: str, spec: Schema) -> Schema:
    """A namespaced resource."""
    metadata = _closed({"name": _NAME, "labels": _LABELS}, "name")
    properties = {"apiVersion": {"const": api_version}, "kind": {"const": kind}, "metadata": metadata, "spec": spec}
    return _closed(properties, "apiVersion", "kind", "metadata", "spec")


_TEXT: Schema = {"type": "string", "minLength": 1}
_NAME: Schema = {**_TEXT, "maxLength": 253, "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}
_KIND: Schema = {"type": "string", "maxLength": 63, "pattern": "^[A-Za-z][A-Za-z0-9]*$"}
_LABEL: Schema = {"type": "string", "maxLength": 63, "pattern": r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"}
_LABELS: Schema = {"type": "object", "additionalProperties": _LABEL, "minProperties": 1, "maxProperties": 64}
_SELECTOR = _closed({"matchLabels": _LABELS}, "matchLabels")
_PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
_NUMBERED_PORT = _closed({"number": _PORT}, "number")

# gateway-api-inference-extension v1.5.0, config/crd/bases/inference.networking.k8s.io_inferencepools.yaml
INFERENCE_POOL = _resource(
    "inference.networking.k8s.io/v1",
    "InferencePool",
    _closed(
        {
            "selector": _SELECTOR,
            "targetPorts": _list(_NUMBERED_PORT, minItems=1, maxItems=8),
            "appProtocol": {"enum": ["http", "kubernetes.io/h2c"]},
            # A Service, whose port must then be named.
            "endpointPickerRef": _closed(
                {"name": _NAME, "port": _NUMBERED_PORT, "failureMode": {"enum": ["FailOpen", "FailClose"]}},
                "name",
                "port",
            ),
        },
        "selector",
        "targetPorts",
        "endpointPickerRef",
    ),
)

# gateway-api v1.5.1, config/crd/standard/gateway.networking.k8s.io_httproutes.yaml
_DURATION: Schema = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
_PATH = _closed({"type": {"enum": ["Exact", "PathPrefix", "RegularExpression"]}, "value": {**_TEXT, "pattern": "^/"}})
HTTP_ROUTE = _resource(
    "gateway.networking.k8s.io/v1",
    "HTTPRoute",
    _closed(
        {
            "parentRefs": _list(_closed({"name": _NAME}, "name"), maxItems=32),
            "rules": _list(
                _closed(
                    {
                        "matches": _list(_closed({"path": _PATH}), maxItems=64),
                        "backendRefs": _list(
                            _closed({"group": _NAME, "kind": _KIND, "name": _NAME}, "name"), maxItems=16
                        ),
                        "timeouts": _closed({"request": _DURATION}),
                    }
                ),
                minItems=1,
                maxItems=16,
            ),
        }
    ),
)

# prometheus-operator v0.93.0, example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml
_RELABELING = _closed(
    {
        "sourceLabels": _list({"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"}),
        "regex": {"type": "string"},
        "action": {"enum": ["replace", "keep", "drop", "hashmod", "labelmap", "labeldrop", "labelkeep"]},
    }
)
POD_MONITOR = _resource(
    "monitoring.coreos.com/v1",
    "PodMonitor",
    _closed(
        {
            "selector": _SELECTOR,
            "podMetricsEndpoints": _list(
                _closed(
                    {
                        "port": {"type": "string"},
                        "path": {"type": "string"},
                        "interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
                        "metricRelabelings": _list(_RELABELING, minItems=1),
                    }
                )
            ),
        },
        "selector",
    ),
)

# llm-d-router v0.10.0, apix/config/v1alpha1/endpointpickerconfig_types.go and the parameters of the plugins that are
# named here. It decodes strictly: a field that it does not know stops it.
_ENGINE = _closed(
    {
        "name": _TEXT,
        "queuedRequestsSpec": _TEXT,
        "runningRequestsSpec": _TEXT,
        "kvUsageSpec": _TEXT,
        "loraSpec": _TEXT,
    },
    "name",
)
_REFERENCE = _closed({"pluginRef": _TEXT, "weight": {"type": "number"}}, "pluginRef")
_PLUGINS: dict[str, Schema | None] = {
    "core-metrics-extractor": _closed({"defaultEngine": _TEXT, "engineConfigs": _list(_ENGINE)}),
    "kv-cache-utilization-scorer": None,
    "lora-affinity-scorer": None,
    "metrics-data-source": _closed({"path": _TEXT, "port": _PORT}),
    "openai-parser": None,
    "passthrough-parser": None,
    "queue-scorer": None,
}
ENDPOINT_PICKER_CONFIG = _closed(
    {
        "apiVersion": {"const": "llm-d.ai/v1alpha1"},
        "kind": {"const": "EndpointPickerConfig"},
        "plugins": _list(
            {
                "oneOf": [
                    _closed({"type": {"const": name}, **({"parameters": parameters} if parameters else {})}, "type")
                    for name, parameters in _PLUGINS.items()
                ]
            }
        ),
        "schedulingProfiles": _list(
            _closed({"name": _TEXT, "plugins": _list(_REFERENCE)}, "name", "plugins"), minItems=1
        ),
        "requestHandler": _closed({"parsers": _list(_closed({"pluginRef": _TEXT}, "pluginRef"))}),
    },
    "apiVersion",
    "kind",
    "plugins",
    "schedulingProfiles",
)

BY_KIND = {"InferencePool": INFERENCE_POOL, "HTTPRoute": HTTP_ROUTE, "PodMonitor": POD_MONITOR}

# grafana v11.6.0, kinds/dashboard/dashboard_kind.cue and the schemas of the panels. A Grafana numbers panels by itself,
# and has its own source of data.
_SOURCE = _closed({"type": {"const": "prometheus"}, "uid": {"const": "${datasource}"}}, "type", "uid")
_FLAG: Schema = {"type": "boolean"}


def _up_to(most: int) -> Schema:
    return {"type": "integer", "minimum": 0, "maximum": most}


_PLACE = _closed({"x": _up_to(23), "y": _up_to(1000), "w": _up_to(24), "h": _up_to(100)}, "x", "y", "w", "h")
_QUERY = _closed(
    {"datasource": _SOURCE, "refId": _TEXT, "expr": _TEXT, "legendFormat": _TEXT, "format": {"enum": ["heatmap"]}},
    *("datasource", "refId", "expr", "legendFormat"),
)
_TOOLTIP = _closed({"mode": {"enum": ["single", "multi", "none"]}, "sort": {"enum": ["asc", "desc", "none"]}})
_OPTIONS = {
    "timeseries": _closed({"tooltip": _TOOLTIP}),
    "state-timeline": _closed({"showValue": {"enum": ["auto", "never", "always"]}}),
    "heatmap": _closed({"yAxis": _closed({"unit": _TEXT})}),
}
_FIELD = _closed(
    {
        "unit": _TEXT,
        "min": {"type": "number"},
        "color": _closed({"mode": _TEXT}, "mode"),
        "custom": _closed(
            {
                "drawStyle": {"enum": ["line", "bars", "points"]},
                "lineWidth": _up_to(10),
                "fillOpacity": _up_to(100),
                "showPoints": {"enum": ["auto", "never", "always"]},
                "stacking": _closed({"mode": {"enum": ["none", "normal", "percent"]}, "group": _TEXT}),
            }
        ),
    }
)


def _panel(kind: str, options: Schema) -> Schema:
    properties = {
        "type": {"const": kind},
        "title": _TEXT,
        "description": _TEXT,
        "datasource": _SOURCE,
        "gridPos": _PLACE,
        "fieldConfig": _closed({"defaults": _FIELD, "overrides": _list({}, maxItems=0)}, "defaults", "overrides"),
        "options": options,
        "targets": _list(_QUERY, minItems=1),
    }
    return _closed(properties, *properties)


_ROW_PANEL = {"type": {"const": "row"}, "title": _TEXT, "collapsed": _FLAG, "gridPos": _PLACE, "panels": _list(_TEXT)}
_CHOICE: Schema = {"name": _TEXT, "label": _TEXT, "multi": _FLAG, "includeAll": _FLAG, "refresh": _up_to(2)}
_QUERIED = _closed({"qryType": {"const": 1}, "query": _TEXT, "refId": _TEXT}, "qryType", "query", "refId")
_VARIABLES = [
    _closed({"type": {"const": "datasource"}, "query": {"const": "prometheus"}, **_CHOICE}, "type", "name", "query"),
    _closed(
        {
            "type": {"const": "query"},
            "datasource": _SOURCE,
            "query": _QUERIED,
            "allValue": _TEXT,
            "sort": _up_to(8),
            "current": _closed({"selected": _FLAG, "text": _list(_TEXT), "value": _list(_TEXT)}, "text", "value"),
            **_CHOICE,
        },
        *("type", "name", "datasource", "query"),
    ),
]
DASHBOARD = _closed(
    {
        "title": _TEXT,
        "uid": {"type": "string", "minLength": 8, "maxLength": 40},
        "description": _TEXT,
        "tags": _list(_TEXT),
        "schemaVersion": {"const": 41},
        "version": {"type": "integer"},
        "editable": _FLAG,
        "graphTooltip": _up_to(2),
        "timezone": {"enum": ["browser", "utc"]},
        "refresh": {"type": "string"},
        "time": _closed({"from": _TEXT, "to": _TEXT}, "from", "to"),
        "templating": _closed({"list": _list({"oneOf": _VARIABLES})}, "list"),
        "annotations": _closed({"list": _list(_TEXT)}, "list"),
        "panels": _list(
            {
                "oneOf": [
                    _closed(_ROW_PANEL, *_ROW_PANEL),
                    *(_panel(kind, options) for kind, options in _OPTIONS.items()),
                ]
            }
        ),
    },
    *("title", "uid", "schemaVersion", "time", "templating", "annotations", "panels"),
)
