"""deploy/ is valid: Kubernetes' schemas, Ray's own code, our own configs. None of it is started here."""

import copy
import importlib.metadata
import re
import shlex
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema

from bcd import provenance
from bcd.config.serving import ServiceConfig
from bcd.runtime import cluster
from bcd.serving import middleware
from tests import commands

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(DEPLOY.iterdir())}
REQUIREMENTS = TEXTS["requirements.txt"]
DOCUMENTS = [
    document
    for name, text in TEXTS.items()
    if name.endswith(".yaml")
    for document in yaml.safe_load_all(text)
]
# The oldest version of Kubernetes that is still maintained somewhere, and the newest that is known here.
KUBERNETES = ("1.29", "1.37")
# Fields of KubeRay's custom resources (its API reference, v1.5). Kubernetes refuses others.
CLUSTER_FIELDS = {"authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions"}
CLUSTER_FIELDS |= {"headGroupSpec", "headServiceAnnotations", "managedBy", "rayVersion", "suspend"}
CLUSTER_FIELDS |= {"workerGroupSpecs"}
HEAD_FIELDS = {
    "enableIngress",
    "headService",
    "labels",
    "rayStartParams",
    "resources",
    "serviceType",
    "template",
}
WORKER_FIELDS = {"groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts"}
WORKER_FIELDS |= {"rayStartParams", "replicas", "resources", "scaleStrategy", "suspend", "template"}
AUTOSCALER_FIELDS = {"env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources"}
AUTOSCALER_FIELDS |= {"securityContext", "upscalingMode", "version", "volumeMounts"}
# Those that go together with a clusterSelector: no retries and no shutdown of a cluster that others use.
JOB_FIELDS = {
    "activeDeadlineSeconds",
    "clusterSelector",
    "entrypoint",
    "entrypointNumCpus",
    "entrypointNumGpus",
}
JOB_FIELDS |= {"entrypointResources", "jobId", "metadata", "runtimeEnvYAML", "submissionMode"}
JOB_FIELDS |= {"submitterConfig", "submitterPodTemplate"}
SERVICE_FIELDS = {"excludeHeadPodFromServeSvc", "rayClusterConfig", "serveConfigV2", "serveService"}
SERVICE_FIELDS |= {"upgradeStrategy"}
API_VERSIONS = {"ray.io/v1", "policy/v1", "networking.k8s.io/v1", "v1"}


# The commands that are shown to users.
SHOWN = commands.in_markdown(TEXTS["README.md"]) + commands.in_comments(TEXTS["Dockerfile"])


def of_kind(kind: str) -> list[dict[str, Any]]:
    """The documents of a kind."""
    return [document for document in DOCUMENTS if document["kind"] == kind]


(RAYCLUSTER,), (RAYSERVICE,), (BUDGET,) = map(of_kind, ("RayCluster", "RayService", "PodDisruptionBudget"))
CLUSTERS = {"raycluster": RAYCLUSTER["spec"], "rayservice": RAYSERVICE["spec"]["rayClusterConfig"]}


def groups() -> Iterator[tuple[str, dict[str, Any]]]:
    """The head and the worker groups of every cluster."""
    for name, spec in CLUSTERS.items():
        yield f"{name}-head", spec["headGroupSpec"]
        for group in spec["workerGroupSpecs"]:
            yield f"{name}-{group['groupName']}", group


GROUPS = dict(groups())
every_group = pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
every_cluster = pytest.mark.parametrize("spec", CLUSTERS.values(), ids=CLUSTERS)


def pod(group: dict[str, Any]) -> dict[str, Any]:
    """The pod that a group's template makes."""
    metadata = {"name": "pod"} | group["template"].get("metadata", {})
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": group["template"]["spec"]}


def container(group: dict[str, Any]) -> dict[str, Any]:
    """The one container of a group's pods."""
    (only,) = group["template"]["spec"]["containers"]
    return only


def environment(group: dict[str, Any]) -> dict[str, Any]:
    """Its variables: a value, or where it comes from."""
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container(group)["env"]}


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    (version,) = re.findall(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    return version


def node_types(spec: dict[str, Any]) -> dict[str, Any]:
    """What Ray's autoscaler reads out of a cluster; it checks its own schema, too."""
    resource = {"metadata": {"name": "bcd", "namespace": "default"}, "spec": copy.deepcopy(spec)}
    return _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]


# ---- Kubernetes and KubeRay


@pytest.mark.parametrize("version", KUBERNETES)
def test_pods_and_the_budget_are_valid_kubernetes(version):
    core = [document for document in DOCUMENTS if not document["apiVersion"].startswith("ray.io/")]
    for document in core + [pod(group) for group in GROUPS.values()]:
        assert kubernetes_validate.validate(document, version, strict=True) == version


@pytest.mark.parametrize(
    ("field", "wrong"),
    [("livenessProbes", {}), ("resources", {"limit": {"cpu": 1}}), ("env", [{"name": "A", "valu": "b"}])],
)
def test_a_slip_in_a_pod_would_be_seen(field, wrong):
    slipped = copy.deepcopy(pod(GROUPS["rayservice-gpu"]))
    slipped["spec"]["containers"][0][field] = wrong
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(slipped, KUBERNETES[0], strict=True)


def test_custom_resources_have_fields_that_kuberay_knows():
    for spec in CLUSTERS.values():
        assert spec.keys() <= CLUSTER_FIELDS
        assert spec["autoscalerOptions"].keys() <= AUTOSCALER_FIELDS
        assert spec["headGroupSpec"].keys() <= HEAD_FIELDS
        assert all(group.keys() <= WORKER_FIELDS for group in spec["workerGroupSpecs"])
    assert RAYSERVICE["spec"].keys() <= SERVICE_FIELDS
    assert all(job["spec"].keys() <= JOB_FIELDS for job in of_kind("RayJob"))
    assert {document["apiVersion"] for document in DOCUMENTS} == API_VERSIONS


@every_group
def test_pods_have_what_they_may_use(group):
    spec = group["template"]["spec"]
    for each in spec["initContainers"] + spec["containers"]:
        resources = each["resources"]
        assert resources["requests"] == resources["limits"]
        assert {"cpu", "memory", "ephemeral-storage"} <= resources["limits"].keys()


# ---- Ray


@every_cluster
def test_the_head_runs_no_work_and_goes_last(spec):
    assert node_types(spec)["headgroup"]["resources"]["CPU"] == 0
    annotations = pod(spec["headGroupSpec"])["metadata"]["annotations"]
    assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"


@every_cluster
def test_ray_asks_for_a_token(spec):
    assert spec["authOptions"] == {"mode": "token"}


def test_no_secret_stands_in_a_file():
    assert not of_kind("Secret")
    for group in GROUPS.values():
        variables = environment(group)
        assert not variables.keys() & {"RAY_AUTH_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
        assert isinstance(variables.get(middleware.TOKEN_VARIABLE, {}), dict)


def test_workers_come_from_zero_and_jobs_know_how_many_may_come():
    types = node_types(RAYCLUSTER["spec"])
    workers = {name: kind for name, kind in types.items() if name != "headgroup"}
    assert RAYCLUSTER["spec"]["enableInTreeAutoscaling"]
    assert {name: kind["min_workers"] for name, kind in workers.items()} == {"gpu": 0, "cpu": 0}
    assert workers["gpu"]["resources"]["GPU"] == 1
    assert "GPU" not in workers["cpu"]["resources"]
    limit = {
        kind: sum(group["max_workers"] * group["resources"].get(kind, 0) for group in workers.values())
        for kind in ("CPU", "GPU")
    }
    stated = environment(GROUPS["raycluster-head"])[cluster.LIMIT_VARIABLE]
    assert stated == f"CPU={limit['CPU']},GPU={limit['GPU']}"


@every_cluster
def test_rays_version_is_the_pinned_one(spec):
    assert spec["rayVersion"] == pinned("ray")


@every_group
def test_images_are_ours_and_fit_the_device(group):
    """By digest; until that is filled in, no registry can answer with an image."""
    device = "GPU" if "nvidia.com/gpu" in container(group)["resources"]["limits"] else "CPU"
    spec = group["template"]["spec"]
    images = {each["image"] for each in spec["initContainers"] + spec["containers"]}
    assert images == {f"REGISTRY/bcd@sha256:{device}"}


def test_the_commands_fill_in_every_image():
    (line,) = [line for line in SHOWN if line.startswith("sed -i")]
    changes = re.findall(r"s\|([^|]+)\|\$(\w+)\|", line)
    assert changes == [("REGISTRY/bcd@sha256:CPU", "cpu"), ("REGISTRY/bcd@sha256:GPU", "gpu")]
    named = {name for name, text in TEXTS.items() if re.search(r"^ +image:", text, re.M)}
    assert named == set(re.findall(r"deploy/(\S+)", line))
    for device in ("cpu", "gpu"):
        assert any(
            command.startswith(f"{device}=")
            and f"REGISTRY/bcd:{provenance.own_version()}-{device})" in command
            for command in SHOWN
        )


# ---- the image


def test_the_image_is_built_on_rays_by_its_digest():
    """The build argument has no default, so that nobody builds on a tag by mistake."""
    assert re.findall(r"^(?:ARG|FROM) .*$", TEXTS["Dockerfile"], re.M) == ["ARG BASE", "FROM ${BASE}"]
    bases = set(re.findall(r"rayproject/ray:(\S+?)-py3(\d+)-\$device", TEXTS["README.md"]))
    ((version, minor),) = bases
    assert version == pinned("ray")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert Requirement(f"python{project['requires-python']}").specifier.contains(f"3.{minor}")
    assert f"--python-version 3.{minor}" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_pip_installs_by_hash_or_no_dependencies_at_all():
    installs = re.findall(r"pip install (.*)$", TEXTS["Dockerfile"], re.M)
    assert len(installs) == 3
    assert all("--require-hashes" in line or line.endswith("--no-deps .") for line in installs)
    # Build isolation would fetch setuptools without a hash.
    assert all("--no-build-isolation" in line or "setuptools.txt" in line for line in installs)


def locked() -> dict[str, str]:
    """Version of every package in requirements.txt."""
    entries = re.findall(
        r"^(\S+)==(\S+) \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", REQUIREMENTS, re.M
    )
    written = "".join(f"{name}=={version} \\\n{hashes}" for name, version, hashes in entries)
    assert written == REQUIREMENTS, "something else than versions and hashes: no address of an index"
    return {name: version for name, version, _ in entries}


def required(names: list[str]) -> Iterator[str]:
    """All packages that requirements need on Linux with Python 3.12, by what is installed here."""
    environment = default_environment() | {"python_version": "3.12", "python_full_version": "3.12.0"}
    waiting, seen = [Requirement(name) for name in names], set[tuple[str, str]]()
    while waiting:
        wanted = waiting.pop()
        for extra in ("", *wanted.extras):
            if (key := (canonicalize_name(wanted.name), extra)) in seen:
                continue
            seen.add(key)
            yield key[0]
            for line in importlib.metadata.requires(wanted.name) or []:
                needs = Requirement(line)
                if not needs.marker or needs.marker.evaluate(environment | {"extra": extra}):
                    waiting.append(needs)


def test_the_hashes_are_those_of_the_pinned_versions():
    """After a change of versions: `make requirements`."""
    versions = locked()
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    assert {name: pins.get(name) for name in versions.keys() - {"setuptools"}} == {
        name: version for name, version in versions.items() if name != "setuptools"
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = set(required(project["dependencies"] + project["optional-dependencies"]["aws"] + ["setuptools"]))
    assert sorted(needs - versions.keys()) == []


def test_the_image_is_not_root_asks_for_a_token_and_reports_nothing():
    assert "USER" not in re.findall(r"^[A-Z]+", TEXTS["Dockerfile"], re.M), "that of Ray's image"
    variables = shlex.split(
        re.search(r"^ENV ((?:.*\\\n)*.*)$", TEXTS["Dockerfile"], re.M)[1].replace("\\\n", "")
    )
    assert {"RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0"} <= set(variables)


def test_what_the_image_copies_is_there_and_nothing_else_is_sent_to_the_builder():
    copied = {
        name
        for line in re.findall(r"^COPY --chown=ray:users (.*)$", TEXTS["Dockerfile"], re.M)
        for name in line.split()[:-1]
    }
    ignored = TEXTS["Dockerfile.dockerignore"].splitlines()
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


# ---- jobs


def test_there_is_a_job_to_train_and_one_to_score():
    doors = [re.search(r"jobs/(\w+)\.py", job["spec"]["entrypoint"])[1] for job in of_kind("RayJob")]
    assert sorted(doors) == ["score", "train"]


@pytest.mark.parametrize("job", of_kind("RayJob"), ids=lambda job: job["metadata"]["generateName"])
def test_jobs_are_commands_in_the_image_on_the_cluster(job):
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": RAYCLUSTER["metadata"]["name"]}
    # The mode in which KubeRay submits a job again to a new head that does not know it.
    assert job["spec"]["submissionMode"] == "HTTPMode"
    python, script, *_ = shlex.split(job["spec"]["entrypoint"])
    (folder,) = re.findall(r"^WORKDIR (\S+)$", TEXTS["Dockerfile"], re.M)
    assert python == "python"
    assert (ROOT / Path(script).relative_to(folder)).is_file()
    config = commands.check_job(*commands.job(job["spec"]["entrypoint"]))
    assert config.output.startswith("s3://"), "a pod's disk goes with it"


# ---- the service


def test_the_service_is_that_of_serve_yaml():
    config = yaml.safe_load(RAYSERVICE["spec"]["serveConfigV2"])
    assert config == yaml.safe_load((ROOT / "serve.yaml").read_text(encoding="utf-8"))
    checked = ServeDeploySchema(**config)
    assert checked.applications[0].import_path == "bcd.serving.serve:app"
    assert checked.http_options.host == "0.0.0.0"
    ServiceConfig(**checked.applications[0].args)


def test_its_replicas_find_room():
    (application,) = yaml.safe_load(RAYSERVICE["spec"]["serveConfigV2"])["applications"]
    settings = ServiceConfig(**application["args"])
    (worker,) = (kind for name, kind in node_types(CLUSTERS["rayservice"]).items() if name != "headgroup")
    assert 1 < worker["min_workers"] <= settings.min_replicas
    each = min(
        worker["resources"]["CPU"] // settings.num_cpus, worker["resources"]["GPU"] // settings.num_gpus
    )
    assert settings.max_replicas <= each * worker["max_workers"]


@pytest.mark.parametrize("group", ["rayservice-head", "rayservice-gpu"])
def test_callers_need_a_token_from_a_secret(group):
    variables = environment(GROUPS[group])
    assert variables[middleware.TOKEN_VARIABLE] == {"secretKeyRef": {"name": "bcd-api-token", "key": "token"}}
    assert variables[middleware.PROXY_VARIABLE] == middleware.PROXY_CALLBACK
    assert "kubectl create secret generic bcd-api-token --from-literal=token=" in TEXTS["README.md"]


def test_probes_are_answered_without_a_token():
    worker = container(GROUPS["rayservice-gpu"])
    asked = worker["readinessProbe"]["httpGet"]
    port = yaml.safe_load(RAYSERVICE["spec"]["serveConfigV2"])["http_options"]["port"]
    assert asked == {"path": "/-/healthz", "port": port}
    assert asked["path"] in middleware.PUBLIC
    assert {"name": "serve", "containerPort": port} in worker["ports"]
    assert "/api/local_raylet_healthz" in worker["livenessProbe"]["exec"]["command"][-1]


@pytest.mark.parametrize("group", ["rayservice-head", "rayservice-gpu"])
def test_metrics_are_at_a_named_port(group):
    ports = {each["name"]: each["containerPort"] for each in container(GROUPS[group])["ports"]}
    assert GROUPS[group]["rayStartParams"]["metrics-export-port"] == str(ports["metrics"])
    (policy,) = (each for each in of_kind("NetworkPolicy") if each["metadata"]["name"] == "bcd-metrics")
    assert policy["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": ports["metrics"]}]


def test_one_replica_always_stays():
    labels = pod(GROUPS["rayservice-gpu"])["metadata"]["labels"]
    assert BUDGET["spec"]["selector"]["matchLabels"].items() <= labels.items()
    # With as many as there are at least, no node could ever be drained.
    assert 1 <= BUDGET["spec"]["minAvailable"] < GROUPS["rayservice-gpu"]["minReplicas"]


# ---- what the documents say


def test_the_commands_name_what_is_there():
    for line in SHOWN:
        words = shlex.split(line, comments=True)
        for flag, value in pairwise(words):
            if flag in ("-f", "--filename"):
                assert (ROOT / value).is_file(), line
            if flag == "--build-arg":
                assert value.startswith("BASE="), line
            if flag == "-t":
                assert value.removeprefix("REGISTRY/").startswith(f"bcd:{provenance.own_version()}-"), line
    applied = {
        match for line in SHOWN for match in re.findall(r"kubectl (?:apply|create) -f deploy/(\S+)", line)
    }
    assert applied == {name for name in TEXTS if name.endswith(".yaml")}


def test_redis_is_an_option_that_kuberay_knows():
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXTS["README.md"], re.S)
    options = yaml.safe_load(block)
    assert options.keys() == {"gcsFaultToleranceOptions"} <= CLUSTER_FIELDS
    redis = options["gcsFaultToleranceOptions"]
    assert redis.keys() == {"redisAddress", "redisPassword"}
    assert redis["redisPassword"]["valueFrom"].keys() == {"secretKeyRef"}, "no password in a file"


def test_the_commands_for_ray_and_for_the_jobs_are_valid():
    ours = [line for line in SHOWN if commands.is_rays(line)]
    assert ours
    for line in ours:
        commands.check_rays(line)
        if job := commands.job(line):
            commands.check_job(*job)


@pytest.mark.parametrize("line", ["ray job submitt -- x", "ray up --now cluster.yaml", "serve deploy"])
def test_a_slip_in_a_command_would_be_seen(line):
    with pytest.raises(commands.click.UsageError):
        commands.check_rays(line)
