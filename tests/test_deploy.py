# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""scripts/deploy: each file against its schema, offline, and all of them against each other."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import compose_spec
import jsonpatch
import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from deploy_schemas import BY_KIND, ENDPOINT_PICKER_CONFIG
from tritonlora.cli import commands
from tritonlora.launch.tritonserver import EXIT_TIMEOUT_SECONDS, Tritonserver, server_command
from tritonlora.machine import Ports
from tritonlora.openai.settings import DEFAULT_PORT
from tritonlora.repository import desired_state

DEPLOY = Path(__file__).parents[1] / "scripts" / "deploy"
KUBERNETES_VERSIONS = ("1.30", kubernetes_validate.latest_version())
PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}
FORCE_SECONDS = 10  # what Server.stop waits beyond --exit-timeout-secs

Document = dict[str, Any]


def documents() -> Iterator[tuple[str, Document]]:
    """Every Kubernetes resource, by `<file>: <kind>`."""
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if path.name != "kustomization.yaml":
                yield f"{path.name}: {document['kind']}", document


def with_openai(resources: dict[str, Document]) -> dict[str, Document]:
    """The resources that kubernetes-openai changes, as kustomize changes them."""
    base = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())["resources"]
    changed = {}
    for one in yaml.safe_load((DEPLOY / "kubernetes-openai" / "kustomization.yaml").read_text())["patches"]:
        kind, name = one["target"]["kind"], one["target"]["name"]
        [key] = [
            key
            for key, found in resources.items()
            if found["kind"] == kind and re.fullmatch(name, found["metadata"]["name"]) and key.split(": ")[0] in base
        ]
        changed[key] = jsonpatch.apply_patch(copy.deepcopy(resources[key]), yaml.safe_load(one["patch"]))
    return changed


RESOURCES = dict(documents())
WITH_OPENAI = with_openai(RESOURCES)
SERVER = RESOURCES["server.yaml: Deployment"]["spec"]["template"]
CONTAINER = SERVER["spec"]["containers"][0]
POOL = RESOURCES["inferencepool.yaml: InferencePool"]["spec"]
PICKER = RESOURCES["endpoint-picker.yaml: Deployment"]["spec"]["template"]
SYNCED = RESOURCES["sync-adapters.yaml: ConfigMap"]
PICKER_CONFIG = yaml.safe_load(RESOURCES["endpoint-picker.yaml: ConfigMap"]["data"]["config.yaml"])


def validate(document: Document) -> None:
    """Raises what the schema of the document's kind has against it; unknown fields are errors."""
    schema = BY_KIND.get(document["kind"])
    if schema:
        jsonschema.Draft202012Validator(schema).validate(document)
    else:
        for version in KUBERNETES_VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)


def compose_text(**values: str) -> str:
    """compose.yaml with its variables filled in, as compose does before it looks at the file."""

    def value(match: re.Match[str]) -> str:
        name, operator, rest = match.groups()
        return values[name] if operator == ":?" else values.get(name, rest)

    text = (DEPLOY / "compose.yaml").read_text()
    return re.sub(r"\$\{(\w+)(:[-?])([^}]*)\}", value, text)


COMPOSE = compose_text(MODEL_REPOSITORY="/srv/models", ADAPTERS="/srv/adapters")
SERVICE = yaml.safe_load(COMPOSE)["services"]["triton"]


def dockerfile() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, without comments."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def seconds(duration: str) -> int:
    """A duration of one unit."""
    return int(duration[:-1]) * {"s": 1, "m": 60, "h": 3600}[duration[-1]]


# Each file by itself


@pytest.mark.parametrize("name", RESOURCES)
def test_every_resource_is_what_its_kind_allows(name: str) -> None:
    """By the cluster's own schemas for the kinds of Kubernetes, by ours for the others."""
    validate(RESOURCES[name])


def _misspell_replicas(resources: dict[str, Document]) -> Document:
    deployment = resources["server.yaml: Deployment"]
    deployment["spec"]["replica"] = deployment["spec"].pop("replicas")
    return deployment


def _medium_beside_empty_dir(resources: dict[str, Document]) -> Document:
    volume = resources["server.yaml: Deployment"]["spec"]["template"]["spec"]["volumes"][1]
    volume["medium"] = volume["emptyDir"].pop("medium")
    return resources["server.yaml: Deployment"]


def _no_port_of_the_picker(resources: dict[str, Document]) -> Document:
    del resources["inferencepool.yaml: InferencePool"]["spec"]["endpointPickerRef"]["port"]
    return resources["inferencepool.yaml: InferencePool"]


def _the_pool_of_v1alpha2(resources: dict[str, Document]) -> Document:
    pool = resources["inferencepool.yaml: InferencePool"]
    pool["spec"]["targetPortNumber"] = pool["spec"].pop("targetPorts")[0]["number"]
    return pool


def _timeout_without_a_unit(resources: dict[str, Document]) -> Document:
    resources["inferencepool.yaml: HTTPRoute"]["spec"]["rules"][0]["timeouts"]["request"] = "600"
    return resources["inferencepool.yaml: HTTPRoute"]


def _endpoints_of_a_service_monitor(resources: dict[str, Document]) -> Document:
    monitor = resources["podmonitor.yaml: PodMonitor"]
    monitor["spec"]["endpoints"] = monitor["spec"].pop("podMetricsEndpoints")
    return monitor


def _schedule_of_a_job(resources: dict[str, Document]) -> Document:
    job = resources["sync-adapters.yaml: CronJob"]
    job["spec"]["jobTemplate"]["spec"]["schedule"] = job["spec"].pop("schedule")
    return job


@pytest.mark.parametrize(
    "change",
    [
        _schedule_of_a_job,
        _misspell_replicas,
        _medium_beside_empty_dir,
        _no_port_of_the_picker,
        _the_pool_of_v1alpha2,
        _timeout_without_a_unit,
        _endpoints_of_a_service_monitor,
    ],
)
def test_a_resource_with_a_mistake_is_refused(change: Callable[[dict[str, Document]], Document]) -> None:
    """So that the test above means something."""
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(change(copy.deepcopy(RESOURCES)))


def test_the_endpoint_pickers_config_is_what_it_decodes() -> None:
    """It stops at a plugin, a parameter or a field that it does not know, and at a reference to nothing."""
    jsonschema.Draft202012Validator(ENDPOINT_PICKER_CONFIG).validate(PICKER_CONFIG)
    references = [one for profile in PICKER_CONFIG["schedulingProfiles"] for one in profile["plugins"]]
    references += PICKER_CONFIG["requestHandler"]["parsers"]

    assert {one["pluginRef"] for one in references} <= {plugin["type"] for plugin in PICKER_CONFIG["plugins"]}


def test_compose_yaml_is_what_the_compose_specification_allows() -> None:
    """With its variables filled in."""
    compose_spec.PyCompose.from_yaml(COMPOSE).validate()

    with pytest.raises(ValueError, match="shm_sise"):
        compose_spec.PyCompose.from_yaml(COMPOSE.replace("shm_size", "shm_sise"))


def test_the_dockerfile_starts_from_nvidias_image_and_keeps_its_torch() -> None:
    """And its entry point, which execs the command: process 1 is tritonlora, without a shell that keeps signals."""
    instructions = dockerfile()
    words = [word for word, _ in instructions]
    [build, install] = [rest for word, rest in instructions if word == "RUN"]
    image = "nvcr.io/nvidia/tritonserver:${TRITON_VERSION}-trtllm-python-py3"

    assert [f"{image} AS build", image] == [rest for word, rest in instructions if word == "FROM"]
    assert ["ARG", "FROM"] == words[:2]
    assert "ENTRYPOINT" not in words
    assert ("CMD", '["tritonlora", "serve", "--address", "0.0.0.0"]') == instructions[-1]
    assert "pip wheel" in build
    assert "--constraint container.txt --constraint added.txt" in " ".join(install.split())


def test_what_the_image_adds_has_our_versions_and_what_it_has_stays(tmp_path: Path) -> None:
    """The line of the Dockerfile that makes added.txt, on a container that has torch and typing_extensions."""
    install = [rest for word, rest in dockerfile() if word == "RUN"][1]
    [select] = [part for part in install.replace("\\\n", " ").split("&&") if "awk" in part]
    (tmp_path / "container.txt").write_text("torch==2.7.0a0+nv25\ntyping_extensions==4.1\n")
    (tmp_path / "pins.txt").write_text("# pinned\ntorch==2.13.0\ntyping-extensions==4.15.0\ntyper==0.20\n")
    subprocess.run(["bash", "-c", select], cwd=tmp_path, check=True)

    assert ["typer==0.20"] == [line for line in (tmp_path / "added.txt").read_text().splitlines() if line[0] != "#"]


def pod_of(name: str) -> Document:
    """The pod that a Deployment, a Job or a CronJob makes."""
    spec = RESOURCES[name]["spec"]
    pod: Document = spec.get("jobTemplate", {"spec": spec})["spec"]["template"]["spec"]
    return pod


WRITERS = ("add-adapter.yaml: Job", "sync-adapters.yaml: CronJob")  # of the model repository


@pytest.mark.parametrize("name", ["server.yaml: Deployment", *WRITERS])
def test_a_pod_of_ours_has_no_rights(name: str) -> None:
    """The image's user, no capabilities, nothing to write to but its volumes, no token of the cluster's."""
    pod = pod_of(name)
    [container] = pod["containers"]
    [user] = [rest for word, rest in dockerfile() if word == "USER"]

    assert pod["automountServiceAccountToken"] is False
    assert (True, int(user)) == (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"])
    assert ["ALL"] == container["securityContext"]["capabilities"]["drop"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]  # noqa: S108


def test_the_image_gets_the_wheel_with_what_add_needs() -> None:
    """The second stage has nothing of the checkout but the wheel of the first one."""
    instructions = dockerfile()
    second = instructions[[word for word, _ in instructions].index("FROM", 2) :]
    installs = next(rest for word, rest in second if word == "RUN")

    assert ["--from=build /build/dist dist", "scripts/constraints.txt pins.txt"] == [
        rest for word, rest in second if word == "COPY"
    ]
    assert "dist/*.whl)[convert,openai]" in installs


def test_the_image_gets_what_it_is_built_from_and_nothing_else() -> None:
    """What COPY names exists and passes the ignore file."""
    root = DEPLOY.parents[1]
    copies = [rest.split()[:-1] for word, rest in dockerfile() if word == "COPY" and "--from" not in rest]
    copied = {source for sources in copies for source in sources}
    allowed = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}

    assert copied == allowed
    assert all((root / source).exists() for source in copied)


# All of them together


def test_every_selector_finds_the_servers() -> None:
    """The Deployment's own, the Service's, the PodMonitor's and the pool's."""
    labels = SERVER["metadata"]["labels"].items()
    selectors = [
        RESOURCES["server.yaml: Deployment"]["spec"]["selector"]["matchLabels"],
        RESOURCES["server.yaml: Service"]["spec"]["selector"],
        RESOURCES["podmonitor.yaml: PodMonitor"]["spec"]["selector"]["matchLabels"],
        POOL["selector"]["matchLabels"],
    ]
    picker = RESOURCES["endpoint-picker.yaml: Service"]["spec"]["selector"]

    assert all(selector.items() <= labels for selector in selectors)
    assert not any(selector.items() <= PICKER["metadata"]["labels"].items() for selector in selectors)
    assert picker.items() <= PICKER["metadata"]["labels"].items()


def test_the_ports_are_tritons_everywhere() -> None:
    """And those of `tritonlora serve`, which is started without naming any."""
    defaults = Ports()
    published = [port.split(":") for port in SERVICE["ports"]]
    monitored = RESOURCES["podmonitor.yaml: PodMonitor"]["spec"]["podMetricsEndpoints"][0]["port"]
    scraped = {plugin["type"]: plugin.get("parameters") for plugin in PICKER_CONFIG["plugins"]}["metrics-data-source"]

    assert {"http": defaults.http, "grpc": defaults.grpc, "metrics": defaults.metrics} == PORTS
    assert PORTS == {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    assert PORTS == {port["targetPort"]: port["port"] for port in RESOURCES["server.yaml: Service"]["spec"]["ports"]}
    assert [["127.0.0.1", str(port), str(port)] for port in PORTS.values()] == published
    assert [{"number": PORTS["http"]}] == POOL["targetPorts"]
    assert monitored == "metrics"
    assert PORTS["metrics"] == scraped["port"]


def test_a_server_in_a_container_can_be_reached_from_outside() -> None:
    """`tritonlora serve` listens at its own machine alone unless it is told otherwise; and takes what it is told."""
    told = [json.loads(dockerfile()[-1][1]), SERVICE["command"], CONTAINER["args"]]
    [command] = {tuple(words) for words in told}
    options = typer.main.get_command(commands.app).commands["serve"].params  # type: ignore[attr-defined]
    address = next(option for option in options if option.name == "address")

    assert ("tritonlora", "serve", "--address", "0.0.0.0") == command  # noqa: S104
    assert "127.0.0.1" == address.default
    everywhere = server_command(Tritonserver(Path("tritonserver")), Path("/models"), Ports(), address=command[-1])
    assert {f"--{kind}-address=0.0.0.0" for kind in PORTS} <= {*everywhere}


def test_probes_ask_triton_and_leave_it_time_to_load() -> None:
    """Ready when every model is; alive when the process answers; an hour until then, as `tritonlora serve` waits."""
    paths = {name: CONTAINER[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    startup = CONTAINER["startupProbe"]

    assert {"startup": "/v2/health/ready", "readiness": "/v2/health/ready", "liveness": "/v2/health/live"} == paths
    assert (
        3600
        == startup["periodSeconds"] * startup["failureThreshold"]
        == seconds(SERVICE["healthcheck"]["start_period"])
    )
    assert SERVICE["healthcheck"]["test"][-1] == "http://localhost:8000/v2/health/ready"


def test_requests_under_way_may_end_before_the_container_is_killed() -> None:
    """The grace period covers waiting for the routes, --exit-timeout-secs, and the force after it."""
    needed = EXIT_TIMEOUT_SECONDS + FORCE_SECONDS
    before_the_signal = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][-1])

    assert before_the_signal + needed <= SERVER["spec"]["terminationGracePeriodSeconds"]
    assert needed <= seconds(SERVICE["stop_grace_period"])
    assert SERVER["spec"]["terminationGracePeriodSeconds"] <= PICKER["spec"]["terminationGracePeriodSeconds"]


def test_shared_memory_is_memory_and_large() -> None:
    """Kubernetes and Docker give 64 MiB, less than one adapter."""
    mounts = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in SERVER["spec"]["volumes"]}

    assert {"medium": "Memory", "sizeLimit": "4Gi"} == volumes[mounts["/dev/shm"]]["emptyDir"]  # noqa: S108
    assert SERVICE["shm_size"] == "4gb"


def test_the_config_map_is_a_desired_state_that_its_job_can_reach(capsys: pytest.CaptureFixture[str]) -> None:
    """The file lies where the command looks for it, and its sources on a volume. Every option is one of the command."""
    pod, [(file, text)] = pod_of("sync-adapters.yaml: CronJob"), SYNCED["data"].items()
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    program, command, path, *options = pod["containers"][0]["args"]
    wanted = desired_state.parse(text.encode())

    assert ("tritonlora", file) == (program, Path(path).name)
    assert {"name": SYNCED["metadata"]["name"]} == volumes[mounts[str(Path(path).parent)]]["configMap"]
    assert {str(Path(one.source or "").parent) for one in wanted.adapters.values()} <= mounts.keys()
    assert wanted.aliases
    assert 0 == commands.main([command, *options, "--help"])
    assert all(option in capsys.readouterr().out for option in options)


@pytest.mark.parametrize("name", WRITERS)
def test_the_model_repository_is_one_volume_that_only_commands_write_to(name: str) -> None:
    """Servers mount it read-only, where the image looks for it."""
    adding = pod_of(name)
    claim = RESOURCES["server.yaml: PersistentVolumeClaim"]
    served = next(mount for mount in CONTAINER["volumeMounts"] if mount["name"] == "model-repository")
    written = next(mount for mount in adding["containers"][0]["volumeMounts"] if mount["name"] == "model-repository")
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in [*SERVER["spec"]["volumes"], *adding["volumes"]]
        if volume["name"] == "model-repository"
    }

    assert ("ENV", f"TRITONLORA_REPO={served['mountPath']}") in dockerfile()
    assert served["readOnly"]
    assert {"name": "model-repository", "mountPath": served["mountPath"]} == written
    assert {claim["metadata"]["name"]} == claims
    assert ["ReadWriteMany"] == claim["spec"]["accessModes"]
    assert served["mountPath"] == SERVICE["volumes"][0]["target"]


def test_the_endpoint_picker_reads_the_routers_lora_metric_from_these_pods() -> None:
    """Through the pods' engine label; the route leads to the pool, and the pool to the picker."""
    plugins = {plugin["type"]: plugin.get("parameters", {}) for plugin in PICKER_CONFIG["plugins"]}
    extractor = plugins["core-metrics-extractor"]
    engines = {engine["name"]: engine for engine in extractor["engineConfigs"]}
    service = RESOURCES["endpoint-picker.yaml: Service"]
    route = RESOURCES["inferencepool.yaml: HTTPRoute"]["spec"]["rules"][0]["backendRefs"][0]
    pool = RESOURCES["inferencepool.yaml: InferencePool"]

    assert "lora-affinity-scorer" in plugins
    assert "lora_requests_info" == engines[SERVER["metadata"]["labels"]["llm-d.ai/engine-type"]]["loraSpec"]
    assert extractor["defaultEngine"] in engines
    assert {
        "name": service["metadata"]["name"],
        "port": {"number": service["spec"]["ports"][0]["port"]},
    }.items() <= POOL["endpointPickerRef"].items()
    assert f"--pool-name={pool['metadata']['name']}" in PICKER["spec"]["containers"][0]["args"]
    assert {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": pool["metadata"]["name"]} == route


@pytest.mark.parametrize("name", WITH_OPENAI)
def test_every_resource_with_the_openai_container_is_what_its_kind_allows(name: str) -> None:
    """After the patches."""
    validate(WITH_OPENAI[name])
    assert WITH_OPENAI[name] != RESOURCES[name]


def test_the_openai_container_is_as_safe_as_the_server_and_ends_before_the_pod() -> None:
    """The route and the pool lead to it, its probes to /health, and its arguments are options of the command."""
    pod = WITH_OPENAI["server.yaml: Deployment"]["spec"]["template"]["spec"]
    server, door = pod["containers"]
    program, command, *arguments = door["args"]
    told = dict(zip(arguments[::2], arguments[1::2], strict=True))
    options = typer.main.get_command(commands.app).commands["openai"].params  # type: ignore[attr-defined]
    known = {spelt for option in options for spelt in option.opts}
    waits = int(door["lifecycle"]["preStop"]["exec"]["command"][-1])
    mounts = {mount["name"]: mount for mount in server["volumeMounts"]}

    assert server == CONTAINER
    assert ("tritonlora", "openai", CONTAINER["image"]) == (program, command, door["image"])
    assert told.keys() <= known
    assert waits + float(told["--drain-seconds"]) < pod["terminationGracePeriodSeconds"]
    assert {"TRITONLORA_API_KEY"} == {one["name"] for one in door["env"]}
    assert {"name": "openai", "containerPort": DEFAULT_PORT} == door["ports"][0]
    assert ("/health", "openai") == tuple(door["readinessProbe"]["httpGet"][key] for key in ("path", "port"))
    assert server["securityContext"] == door["securityContext"]
    assert all(mount == mounts[mount["name"]] for mount in door["volumeMounts"])
    assert [{"number": DEFAULT_PORT}] == WITH_OPENAI["inferencepool.yaml: InferencePool"]["spec"]["targetPorts"]
    [rule] = WITH_OPENAI["inferencepool.yaml: HTTPRoute"]["spec"]["rules"]
    assert "/v1" == rule["matches"][0]["path"]["value"]
    assert "openai" in [one["port"] for one in RESOURCES["podmonitor.yaml: PodMonitor"]["spec"]["podMetricsEndpoints"]]


def test_the_endpoint_picker_reads_openais_bodies_before_it_takes_every_path() -> None:
    """A parser without paths of its own stops those after it."""
    parsers = [one["pluginRef"] for one in PICKER_CONFIG["requestHandler"]["parsers"]]

    assert ["openai-parser", "passthrough-parser"] == parsers


def test_every_image_of_ours_has_one_name() -> None:
    """Built by compose or by hand, used by the servers and by the jobs."""
    used = {CONTAINER["image"], *(pod_of(name)["containers"][0]["image"] for name in WRITERS)}
    version = next(rest for word, rest in dockerfile() if word == "ARG").removeprefix("TRITON_VERSION=")

    assert {f"tritonlora:{version}"} == used
    assert SERVICE["image"] == f"tritonlora:{version}"
    assert {"TRITON_VERSION": version} == {name: str(value) for name, value in SERVICE["build"]["args"].items()}
