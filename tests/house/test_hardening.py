"""deploy/ gives pods, accounts and connections no more rights than they need."""

import inspect
import ipaddress
import os
import re
import shutil
import subprocess
from pathlib import PurePosixPath
from typing import Any

import pytest
from ray._common import tls_utils
from ray._common.usage import usage_constants
from ray.autoscaler._private.kuberay import node_provider

from tests.house.test_deploy import (
    CLUSTERS,
    DEPLOY,
    ROOT,
    SHOWN,
    TEXTS,
    container,
    environment,
    every_cluster,
    every_group,
    of_kind,
    pod,
)

JOBS, SERVICE = CLUSTERS["raycluster"], CLUSTERS["rayservice"]


def containers(group: dict[str, Any]) -> list[dict[str, Any]]:
    """All containers of a group's pods, those that initialise it first."""
    return group["template"]["spec"]["initContainers"] + group["template"]["spec"]["containers"]


def mounts(each: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a container has mounted, by volume."""
    return {mount["name"]: mount for mount in each["volumeMounts"]}


# ---- pods


def restricted(security: dict[str, Any]) -> bool:
    """Whether a container is one of the Pod Security Standard `restricted`, and cannot change its image."""
    return (
        security["allowPrivilegeEscalation"] is False
        and security["capabilities"] == {"drop": ["ALL"]}
        and security["readOnlyRootFilesystem"]
        and not security.keys() & {"privileged", "runAsUser", "runAsNonRoot", "seccompProfile"}
    )


@every_group
def test_pods_have_no_right_that_they_do_not_use(group):
    spec = group["template"]["spec"]
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "runAsGroup": 100,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert all(restricted(each["securityContext"]) for each in containers(group))
    assert not any("hostPort" in port for each in containers(group) for port in each.get("ports", []))


@every_cluster
def test_nor_has_the_autoscaler(spec):
    assert restricted(spec["autoscalerOptions"]["securityContext"])


@every_group
def test_only_tmp_can_be_written(group):
    """/dev/shm and, for the head, /tmp/ray are mounted by KubeRay."""
    volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
    assert all(mounts(each).keys() <= volumes.keys() for each in containers(group))
    writable = [mount["mountPath"] for mount in container(group)["volumeMounts"] if not mount.get("readOnly")]
    assert writable == ["/tmp"]
    assert volumes["tmp"] == {"name": "tmp", "emptyDir": {}}
    assert all(volume.keys() - {"name"} <= {"emptyDir", "secret", "projected"} for volume in volumes.values())


# ---- accounts


@every_group
def test_no_container_has_a_token_for_kubernetes(group):
    assert group["template"]["spec"]["automountServiceAccountToken"] is False
    assert all("kubernetes" not in mounts(each) for each in containers(group))
    for volume in group["template"]["spec"]["volumes"]:
        sources = volume.get("projected", {}).get("sources", [])
        is_token = any("serviceAccountToken" in source for source in sources)
        assert is_token == (volume["name"] == "kubernetes")


@every_cluster
def test_but_the_autoscaler_where_ray_reads_it(spec):
    shared = mounts(container(spec["headGroupSpec"])).keys() & mounts(spec["autoscalerOptions"]).keys()
    assert shared == {"tls"}, "nothing that a job could write"
    (mount,) = [m for m in spec["autoscalerOptions"]["volumeMounts"] if m["name"] == "kubernetes"]
    assert mount["readOnly"]
    (volume,) = [v for v in pod(spec["headGroupSpec"])["spec"]["volumes"] if v["name"] == "kubernetes"]
    token, authority, namespace = volume["projected"]["sources"]
    folder = PurePosixPath(mount["mountPath"])
    files = [token["serviceAccountToken"]["path"], authority["configMap"]["items"][0]["path"]]
    expected = [node_provider.IN_CLUSTER_TOKEN_PATH, node_provider.IN_CLUSTER_CA_CERT_PATH]
    assert [str(folder / file) for file in files] == expected
    assert namespace["downwardAPI"]["items"][0]["path"] == "namespace"


def test_workers_have_accounts_of_their_own():
    """KubeRay gives the head's account the right to delete pods and to change the cluster."""
    accounts = {account["metadata"]["name"]: account for account in of_kind("ServiceAccount")}
    used = set()
    for spec in CLUSTERS.values():
        head = spec["headGroupSpec"]["template"]["spec"]["serviceAccountName"]
        workers = {group["template"]["spec"]["serviceAccountName"] for group in spec["workerGroupSpecs"]}
        assert head not in workers
        used |= workers | {head}
    assert accounts.keys() == used
    assert all(account["automountServiceAccountToken"] is False for account in accounts.values())
    assert not of_kind("RoleBinding") + of_kind("ClusterRoleBinding")


def test_accounts_have_the_role_of_their_policy():
    shown = "\n".join(SHOWN)
    roles = dict(re.findall(r"--role-name (\S+) .* file://deploy/(\S+)", shown))
    assert roles == {"bcd-jobs": "s3-jobs.json", "bcd-service": "s3-service.json"}
    for account in of_kind("ServiceAccount"):
        role = account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].rpartition("/")[2]
        assert role == ("bcd-service" if "-api-" in account["metadata"]["name"] else "bcd-jobs")


# ---- network

HERE = {"kubernetes.io/metadata.name": "here"}
OPERATOR = (
    {"app.kubernetes.io/component": "kuberay-operator"},
    {"kubernetes.io/metadata.name": "kuberay-system"},
)
DNS = ({"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"})
INGRESS = ({"app": "ingress"}, {"bcd-callers": "yes"})
PROMETHEUS = ({"app": "prometheus"}, {"bcd-metrics": "yes"})
STRANGER = ({"app": "other"}, HERE)
Peer = tuple[dict[str, str], dict[str, str]]


def ours(spec: dict[str, Any], kind: str) -> Peer:
    """A pod of a cluster as KubeRay labels it, with the labels of its namespace."""
    group = spec["headGroupSpec"] if kind == "head" else spec["workerGroupSpecs"][0]
    return pod(group)["metadata"]["labels"] | {"ray.io/node-type": kind}, HERE


HEAD, WORKER = ours(JOBS, "head"), ours(JOBS, "worker")
API_HEAD, REPLICA = ours(SERVICE, "head"), ours(SERVICE, "worker")


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a selector of labels selects something with these."""
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    exist = [expression["key"] for expression in selector.get("matchExpressions", [])]
    assert all(expression["operator"] == "Exists" for expression in selector.get("matchExpressions", []))
    return selector.get("matchLabels", {}).items() <= labels.items() and set(exist) <= labels.keys()


def is_peer(rule: dict[str, Any], peer: Peer | str) -> bool:
    """Whether a rule names a pod, or an address."""
    if isinstance(peer, str) or "ipBlock" in rule:
        block = rule.get("ipBlock", {}).get("cidr", "0.0.0.0/32")
        return isinstance(peer, str) and ipaddress.ip_address(peer) in ipaddress.ip_network(block)
    labels, namespace = peer
    same = selects(rule["namespaceSelector"], namespace) if "namespaceSelector" in rule else namespace == HERE
    return same and selects(rule.get("podSelector", {}), labels)


def permitted(direction: str, who: Peer | str, other: Peer | str, port: int, protocol: str = "TCP") -> bool:
    """Whether the policies permit one end of a connection; an end that no policy selects permits all."""
    word = {"Ingress": "from", "Egress": "to"}[direction]
    policies = [
        policy["spec"]
        for policy in of_kind("NetworkPolicy")
        if not isinstance(who, str)
        and who[1] == HERE
        and selects(policy["spec"]["podSelector"], who[0])
        and direction in policy["spec"]["policyTypes"]
    ]
    return not policies or any(
        any(is_peer(peer, other) for peer in rule[word])
        and ("ports" not in rule or {"protocol": protocol, "port": port} in rule["ports"])
        for policy in policies
        for rule in policy.get(direction.lower(), [])
    )


def reaches(source: Peer | str, target: Peer | str, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection is made."""
    leaves = permitted("Egress", source, target, port, protocol)
    return leaves and permitted("Ingress", target, source, port, protocol)


S3, STS, API = "192.0.2.1", "192.0.2.65", "192.0.2.129"


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        *((HEAD, WORKER, 10001), (WORKER, HEAD, 6379), (WORKER, WORKER, 10002), (HEAD, S3, 443)),
        *((WORKER, S3, 443), (WORKER, STS, 443), (REPLICA, S3, 443), (HEAD, API, 443), (API_HEAD, API, 6443)),
        *((OPERATOR, HEAD, 8265), (OPERATOR, API_HEAD, 8265), (REPLICA, API_HEAD, 6379)),
        *((INGRESS, REPLICA, 8000), (API_HEAD, REPLICA, 8000)),
        *((PROMETHEUS, REPLICA, 8080), (PROMETHEUS, API_HEAD, 8080)),
    ],
)
def test_what_must_be_reached_is(source, target, port):
    assert reaches(source, target, port)


@pytest.mark.parametrize("peer", [HEAD, WORKER, API_HEAD, REPLICA])
def test_names_are_found(peer):
    assert reaches(peer, DNS, 53, "UDP")
    assert reaches(peer, DNS, 53)
    assert not reaches(peer, DNS, 443)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        *((STRANGER, target, port) for target in (HEAD, WORKER) for port in (6379, 8265, 8000, 52365)),
        *((WORKER, REPLICA, 8000), (REPLICA, HEAD, 6379), (HEAD, API_HEAD, 8265), (STRANGER, REPLICA, 8000)),
        *((PROMETHEUS, REPLICA, 8000), (PROMETHEUS, WORKER, 8080), (INGRESS, REPLICA, 8080)),
        *((STRANGER, REPLICA, 8080), (STRANGER, API_HEAD, 8080)),
        *(
            (WORKER, API, 443),
            (REPLICA, API, 6443),
            (WORKER, "169.254.169.254", 80),
            (HEAD, "198.51.100.1", 443),
        ),
        *(
            (OPERATOR, HEAD, 6379),
            (OPERATOR, WORKER, 8265),
            (INGRESS, API_HEAD, 8000),
            (INGRESS, REPLICA, 8265),
        ),
        *((INGRESS, WORKER, 8000), (WORKER, STRANGER, 443), (WORKER, S3, 80)),
    ],
)
def test_nothing_else_is_reached(source, target, port):
    assert not reaches(source, target, port)


def test_addresses_that_nobody_filled_in_are_nobodys():
    """RFC 5737 reserves 192.0.2.0/24 for documentation, so that nothing can be reached by mistake."""
    cidrs = re.findall(r"cidr: (\S+)}", TEXTS["network.yaml"])
    assert len(cidrs) == 3
    assert all(ipaddress.ip_network(cidr).subnet_of(ipaddress.ip_network("192.0.2.0/24")) for cidr in cidrs)
    assert "`192.0.2.*`" in TEXTS["README.md"]
    assert any(line.startswith("kubectl label namespace INGRESS bcd-callers=yes") for line in SHOWN)


# ---- TLS


def test_ray_uses_tls_by_the_variables_that_it_reads():
    names = set(re.findall(r'"(RAY_(?:USE_)?TLS\w*)"', inspect.getsource(tls_utils)))
    for spec in CLUSTERS.values():
        options = spec["autoscalerOptions"]
        every = [{entry["name"]: entry["value"] for entry in options["env"]}]
        every += [environment(group) for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
        for variables in every:
            assert names <= variables.keys()
            assert variables["RAY_USE_TLS"] == "1"
            assert {str(PurePosixPath(variables[name]).parent) for name in names - {"RAY_USE_TLS"}} == {
                "/tls"
            }
        assert {"name": "tls", "mountPath": "/tls", "readOnly": True} in options["volumeMounts"]


@every_group
def test_the_key_of_the_authority_is_for_the_init_container_alone(group):
    first, ray = containers(group)
    assert mounts(first)["ca"]["mountPath"] == "/ca"
    assert "ca" not in mounts(ray)
    assert mounts(ray)["tls"] == {"name": "tls", "mountPath": "/tls", "readOnly": True}
    volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
    assert volumes["ca"]["secret"] == {"secretName": "bcd-ca"}
    assert volumes["tls"]["emptyDir"]["medium"] == "Memory"
    kind = "head" if "groupName" not in group else "worker"
    assert first["command"] == ["bash", "/home/ray/bcd/certificate.sh", kind]
    assert "deploy/certificate.sh" in TEXTS["Dockerfile"]


@pytest.mark.process
@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is missing")
@pytest.mark.parametrize(("kind", "is_named"), [("head", True), ("worker", False)])
def test_certificates_are_for_the_pod_that_they_were_made_in(kind, is_named, tmp_path):
    (request,) = [line for line in SHOWN if line.startswith("openssl req")]
    subprocess.run(["bash", "-c", request], cwd=tmp_path, check=True, capture_output=True)
    variables = {"POD_IP": "198.18.0.2", "FQ_RAY_IP": "bcd-head-svc.here.svc.cluster.local"}
    variables |= {"CA": str(tmp_path), "TLS": str(tmp_path / "tls")}
    (tmp_path / "tls").mkdir()
    command = ["bash", DEPLOY / "certificate.sh", kind]
    subprocess.run(command, env=os.environ | variables, check=True, capture_output=True)
    assert {path.name for path in (tmp_path / "tls").iterdir()} == {"tls.crt", "tls.key", "ca.crt"}
    assert (tmp_path / "tls/tls.key").stat().st_mode & 0o77 == 0

    def verify(*names: str) -> bool:
        check = ["openssl", "verify", "-CAfile", tmp_path / "tls/ca.crt", *names, tmp_path / "tls/tls.crt"]
        return not subprocess.run(check, capture_output=True).returncode

    assert all(verify("-purpose", purpose) for purpose in ("sslserver", "sslclient"))
    assert verify("-verify_ip", "198.18.0.2")
    assert verify("-verify_ip", "127.0.0.1")
    assert not verify("-verify_ip", "198.18.0.3")
    assert verify("-verify_hostname", variables["FQ_RAY_IP"]) == is_named


# ---- statistics


def test_ray_reports_no_statistics_to_its_makers():
    off = f"{usage_constants.USAGE_STATS_ENABLED_ENV_VAR}=0"
    named = ("deploy/Dockerfile", "cluster.yaml", "docs/operations/clusters.md")
    assert [name for name in named if off not in (ROOT / name).read_text(encoding="utf-8")] == []
