"""cluster.yaml is a file that `ray up` accepts, and says what the README says it does."""

import copy
import importlib.metadata
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

from bcd.serving import middleware
from tests import commands

ROOT = Path(__file__).parent.parent.parent
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "cluster.yaml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cluster(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)


def test_it_follows_rays_own_schema(cluster: dict[str, Any]) -> None:
    schema = json.loads(
        (Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8")
    )
    jsonschema.validate(cluster, schema)


def test_ray_accepts_it_with_its_defaults_filled_in(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    # Ray's default for AWS installs a nightly wheel of Ray; none of it may be left.
    assert not [command for command in prepared["setup_commands"] if "wheels" in command]


def test_the_head_runs_no_work(cluster: dict[str, Any]) -> None:
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"] == {"CPU": 0}


def test_workers_come_and_go(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert [types[name]["min_workers"] for name in ("gpu", "cpu")] == [0, 0]
    assert types["gpu"]["resources"]["GPU"] >= 1
    assert "GPU" not in types["cpu"]["resources"]
    assert types["cpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert sum(types[name]["max_workers"] for name in ("gpu", "cpu")) <= cluster["max_workers"]
    assert not cluster["provider"]["cache_stopped_nodes"]


@pytest.mark.parametrize("commands", START_COMMANDS)
def test_ray_starts_with_token_authentication_only(cluster: dict[str, Any], commands: str) -> None:
    starts = [command for command in cluster[commands] if "ray start" in command]
    assert starts
    assert all(re.search(r"\bRAY_AUTH_MODE=token\s+ray start\b", command) for command in starts)
    assert all("RAY_USAGE_STATS_ENABLED=0 " in command for command in starts)


def test_every_node_has_the_token_and_every_shell_the_mode(cluster: dict[str, Any], text: str) -> None:
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in command for command in cluster["initialization_commands"])
    assert "RAY_AUTH_TOKEN=" not in text, "a secret has no place in the file"


def test_the_dashboard_listens_on_loopback_only(cluster: dict[str, Any], text: str) -> None:
    assert "--dashboard-host=127.0.0.1" in " ".join(cluster["head_start_ray_commands"])
    assert "0.0.0.0" not in text


def test_disks_are_encrypted_and_end_with_their_node(cluster: dict[str, Any]) -> None:
    for kind in cluster["available_node_types"].values():
        (disk,) = kind["node_config"]["BlockDeviceMappings"]
        assert disk["Ebs"]["Encrypted"]
        assert disk["Ebs"]["DeleteOnTermination"]
        assert kind["node_config"]["MetadataOptions"] == {
            "HttpTokens": "required",
            "HttpPutResponseHopLimit": 1,
        }


def test_s3_is_reached_by_role_and_not_by_key(cluster: dict[str, Any], text: str) -> None:
    assert all(
        "IamInstanceProfile" in kind["node_config"] for kind in cluster["available_node_types"].values()
    )
    assert "AWS_SECRET_ACCESS_KEY" not in text


def test_nodes_get_the_files_that_were_tested(cluster: dict[str, Any]) -> None:
    installs = [
        line for command in cluster["setup_commands"] for line in re.findall(r"pip install (.*)", command)
    ]
    assert len(installs) == 3
    assert all("--require-hashes" in line or line.endswith("--no-deps -e ~/bcd") for line in installs)
    assert cluster["file_mounts"]["~/bcd/requirements.txt"] == "deploy/requirements.txt"
    # Of Ray's defaults for AWS the head installs boto3, without a hash.
    assert cluster["head_setup_commands"] == []
    pinned = re.search(
        r"^ray==([\d.]+)", (ROOT / "deploy/requirements.txt").read_text(encoding="utf-8"), re.M
    )
    assert pinned
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ours = next(r for r in map(Requirement, project["dependencies"]) if r.name == "ray")
    assert ours.specifier.contains(pinned[1])
    installed = importlib.metadata.version("ray")
    assert installed.split(".")[:2] == pinned[1].split(".")[:2]


def test_what_it_mounts_exists(cluster: dict[str, Any]) -> None:
    ours = [local for local in cluster["file_mounts"].values() if not local.startswith("~")]
    assert ours
    assert all((ROOT / local).exists() for local in ours)


def test_the_package_is_on_every_node_and_a_jobs_own_goes_first(cluster: dict[str, Any]) -> None:
    """As `ray up` syncs files without installing anew, it is installed from where they are synced to."""
    assert cluster["file_mounts"]["~/bcd/bcd"] == "bcd"
    assert any(command.endswith("-e ~/bcd") for command in cluster["setup_commands"])


def exported(cluster: dict[str, Any]) -> dict[str, str]:
    """The variables that every shell on every node has."""
    line = next(command for command in cluster["initialization_commands"] if command.startswith("echo"))
    assert line.endswith(" >> ~/.bashrc")
    return dict(word.split("=", 1) for word in shlex.split(line)[1].split(" ")[1:] if "=" in word)


def test_the_shells_have_what_serve_yaml_asks_for(cluster: dict[str, Any]) -> None:
    line = next(command for command in cluster["initialization_commands"] if command.startswith("echo"))
    assert f"{middleware.TOKEN_VARIABLE}=$(cat ~/.ray/api_token)" in line
    assert cluster["file_mounts"]["~/.ray/api_token"] == "~/.ray/api_token"
    assert exported(cluster)[middleware.PROXY_VARIABLE] == middleware.PROXY_CALLBACK


def test_jobs_know_how_many_workers_may_come(cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"].values()
    limit = {
        kind: sum(node.get("max_workers", 0) * node["resources"].get(kind, 0) for node in kinds)
        for kind in ("CPU", "GPU")
    }
    assert exported(cluster)["BCD_CLUSTER_LIMIT"] == f"CPU={limit['CPU']},GPU={limit['GPU']}"


def test_the_commands_in_its_comments_are_valid(text: str) -> None:
    ours = [line for line in commands.in_comments(text) if commands.is_rays(line)]
    assert {"ray up", "ray job", "serve deploy"} <= {" ".join(line.split()[:2]) for line in ours}
    for line in ours:
        commands.check_rays(line)
        if job := commands.job(line):
            commands.check_job(*job)


def test_python_is_pinned_to_a_version_that_we_support(cluster: dict[str, Any]) -> None:
    commands = " ".join(cluster["setup_commands"])
    version = re.search(r"python(3\.\d+) -m venv", commands)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert version
    assert Requirement(f"python{project['requires-python']}").specifier.contains(version[1])
