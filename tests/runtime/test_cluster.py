import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from ray.data._internal.actor_autoscaler.default_actor_autoscaler import DefaultActorAutoscaler

from bcd.config.training import TrainConfig
from bcd.errors import ConfigError, ResourceError
from bcd.runtime import cluster
from tests.cluster import BIN, CLUSTER_CPUS, free_port, wait_for


def fake(monkeypatch, cpus, gpus=0):
    monkeypatch.setattr(cluster, "total_resources", lambda: {"CPU": float(cpus), "GPU": float(gpus)})


@pytest.mark.parametrize(
    ("have", "settings", "expected"),
    [
        ((2, 0), {}, (1, False)),
        ((8, 4), {}, (4, True)),
        ((8, 4), {"device": "cpu"}, (1, False)),
        ((8, 4), {"num_workers": "2"}, (2, True)),
        ((8, 0), {"num_workers": "2-6"}, ((2, 6), False)),
        ((3, 0), {"num_workers": "2-6"}, ((2, 6), False)),
        ((8, 8), {}, (8, True)),
        ((1, 2), {"num_workers": "1-4"}, ((1, 4), True)),
    ],
)
def test_scaling_uses_what_is_there(monkeypatch, have, settings, expected):
    fake(monkeypatch, *have)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(have[0])})
    scaling = cluster.scaling(TrainConfig(data="d", **settings))
    assert (scaling.num_workers, scaling.use_gpu) == expected


@pytest.mark.parametrize(
    ("settings", "live", "expected"),
    [
        # However many there might be, images are read by somebody ...
        ({"num_workers": "2-6"}, 9, 6),
        ({"num_workers": "2-6"}, 5, 4),
        ({"num_workers": "2-6"}, 3, 2),
        # ... also on the nodes that are left; an autoscaler is asked for the fewest.
        ({"num_workers": "1-2"}, 2, 1),
        ({"num_workers": "2-6"}, 0, 2),
        ({"num_workers": "2"}, 9, 2),
        # Workers on GPUs hold no CPU.
        ({"num_workers": "1-4", "device": "gpu"}, 1, 4),
    ],
)
def test_elastic_workers_leave_a_cpu_to_read_images(monkeypatch, settings, live, expected):
    fake(monkeypatch, 64, 8 if "device" in settings else 0)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(live)})
    assert cluster.scaling(TrainConfig(data="d", **settings)).max_workers == expected


@pytest.mark.parametrize(
    ("have", "workers", "runs"),
    [((9, 0), "1", 4), ((9, 0), "1-2", 3), ((2, 0), "1-4", 1), ((9, 8), "2", 4), ((9, 8), "1-4", 2)],
)
def test_runs_beside_each_other_have_room_to_grow(monkeypatch, have, workers, runs):
    fake(monkeypatch, *have)
    assert cluster.room(TrainConfig(data="d", num_workers=workers)) == runs


@pytest.mark.parametrize(
    ("have", "settings", "said"),
    [
        ((2, 0), {"num_workers": "2"}, "2 training workers and 1 CPU for reading images need 3 CPUs.*has 2"),
        ((1, 0), {}, "1 training workers and 1 CPU for reading images need 2 CPUs.*has 1"),
        ((64, 0), {"device": "gpu"}, "1 GPU workers asked for, but the cluster has 0 GPUs"),
        ((64, 2), {"num_workers": "4"}, "4 GPU workers asked for, but the cluster has 2 GPUs"),
        ((64, 2), {"num_workers": "3-8"}, "3 GPU workers asked for"),
    ],
)
def test_more_than_there_is_fails_at_once_with_the_numbers(monkeypatch, have, settings, said):
    fake(monkeypatch, *have)
    with pytest.raises(ResourceError, match=said):
        cluster.scaling(TrainConfig(data="d", **settings))


@pytest.mark.parametrize(
    ("nodes", "gpus", "limit", "expected"),
    [
        # One machine: actors, CPUs of each, threads of each.
        ([2], 0, None, (1, 1, 2)),
        ([1], 0, None, (1, 1, 1)),
        ([3], 0, None, (1, 2, 3)),
        ([4], 0, None, (1, 3, 4)),
        ([16], 0, None, (4, 3, 4)),
        ([16], 0, 2, (2, 3, 4)),
        # Several: as large as the smallest allows, and one CPU stays free.
        ([1, 1], 0, None, (1, 1, 1)),
        ([2, 2, 2], 0, None, (3, 1, 2)),
        ([4, 16], 0, None, (5, 3, 4)),
        # A head node without CPUs holds no model.
        ([0, 8], 0, None, (2, 3, 4)),
        ([8], 4, None, (4, 1, 1)),
        ([8], 4, 3, (3, 1, 1)),
    ],
)
def test_model_workers_leave_a_cpu_free(monkeypatch, nodes, gpus, limit, expected):
    fake(monkeypatch, sum(nodes), gpus)
    now = {"CPU": float(sum(nodes)), "GPU": float(gpus)}
    monkeypatch.setattr(ray, "cluster_resources", lambda: now)
    monkeypatch.setattr(ray, "available_resources", lambda: now)
    found = [{"Alive": True, "Resources": {"CPU": float(n)} if n else {}} for n in nodes]
    monkeypatch.setattr(ray, "nodes", lambda: [*found, {"Alive": False, "Resources": {"CPU": 1.0}}])
    pool = cluster.model_workers(limit)
    assert (pool.size, pool.num_cpus, pool.threads) == expected
    assert (pool.ready, pool.num_gpus) == (pool.size, int(gpus > 0))
    assert pool.size * pool.num_cpus < max(2, sum(nodes))


def test_models_that_compute_on_cpus_reserve_no_gpu(monkeypatch):
    """As with `--engine openvino` on a cluster that has GPUs."""
    fake(monkeypatch, 8, 4)
    for facts in ("cluster_resources", "available_resources"):
        monkeypatch.setattr(ray, facts, lambda: {"CPU": 8.0, "GPU": 4.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}])
    pool = cluster.model_workers(None, may_use_gpus=False)
    assert (pool.size, pool.num_cpus, pool.threads, pool.num_gpus) == (2, 3, 4, 0)


@pytest.mark.parametrize(
    ("nodes", "held", "expected"),
    [
        ([4], 1, (1, 2, 4)),
        ([4], 2, (1, 1, 4)),
        ([2], 1, (1, 1, 2)),
        ([16], 1, (4, 3, 4)),
        ([4, 4], 2, (2, 2, 4)),
    ],
)
def test_model_workers_reserve_less_beside_others(monkeypatch, nodes, held, expected):
    """A service holds CPUs as long as it is up; a job that waited for them would never end."""
    total = float(sum(nodes))
    fake(monkeypatch, total)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": total})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": total - held})
    monkeypatch.setattr(
        ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": float(n)}} for n in nodes]
    )
    pool = cluster.model_workers()
    assert (pool.size, pool.num_cpus, pool.threads) == expected


def test_model_workers_count_on_nodes_that_an_autoscaler_adds(monkeypatch):
    fake(monkeypatch, 32)
    for facts in ("cluster_resources", "available_resources"):
        monkeypatch.setattr(ray, facts, lambda: {"CPU": 8.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}])
    pool = cluster.model_workers()
    assert (pool.size, pool.ready) == (8, 2)


@pytest.mark.parametrize(
    ("nodes", "n", "expected"), [([16], 5, 5), ([0, 8, 8], 5, 3), ([8, 8], 1, 1), ([], 2, 2)]
)
def test_runs_are_spread_over_the_nodes_with_cpus(monkeypatch, nodes, n, expected):
    found = [{"Alive": True, "Resources": {"CPU": float(cpus)}} for cpus in nodes]
    monkeypatch.setattr(ray, "nodes", lambda: [*found, {"Alive": False, "Resources": {"CPU": 8.0}}])
    assert cluster.per_node(n) == expected


def test_runs_beside_each_other_share_the_cores(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(cluster, "cores", lambda: 16)
    for workers in (1, 3, 5, 32):
        cluster.share_cores(workers)
    assert threads == [16, 5, 3, 1]


def test_a_cluster_of_ours_keeps_its_files_from_other_users(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cluster, "MOST_TEMPORARY_LENGTH", 1_000)
    ended = []
    monkeypatch.setattr(cluster.atexit, "register", lambda *call: ended.append(call))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    folder = Path(cluster._private_folder())
    assert (folder.name, folder.parent.parent) == ("ray", tmp_path)
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    folder.mkdir()
    ((end, place),) = ended
    end(place)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("1", "1")])
def test_ray_reports_nothing_unless_it_is_wanted(before, after, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {} if before is None else {"RAY_USAGE_STATS_ENABLED": before})
    monkeypatch.setattr(cluster.ray, "init", lambda **options: None)
    monkeypatch.setattr(cluster, "_close_token", lambda: None)
    monkeypatch.setattr(cluster, "_private_folder", lambda: str(tmp_path))
    cluster._start(several_trainings=False)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == after


@pytest.mark.parametrize("before", [{}, {"RAY_API_SERVER_ADDRESS": "http://other:8265", "PATH": "/bin"}])
@pytest.mark.parametrize("fails", [False, True])
def test_a_cluster_that_trains_states_its_own_address_to_its_processes_alone(
    before, fails, tmp_path, monkeypatch
):
    seen = {}

    def init(**options):
        seen.update(os.environ)
        if fails:
            raise OSError("no room")

    monkeypatch.setattr(os, "environ", dict(before))
    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster, "_close_token", lambda: None)
    monkeypatch.setattr(cluster, "_private_folder", lambda: str(tmp_path))
    with pytest.raises(OSError, match="no room") if fails else nullcontext():
        cluster._start(several_trainings=True)
    port = seen["RAY_GCS_SERVER_PORT"]
    assert seen["RAY_API_SERVER_ADDRESS"] == f"127.0.0.1:{port}"
    named = ("RAY_GCS_SERVER_PORT", "RAY_API_SERVER_ADDRESS", "PATH")
    assert {name: os.environ[name] for name in named if name in os.environ} == before


def test_a_bare_cluster_is_known_to_later_jobs_of_the_process_and_left_after_a_loss(monkeypatch):
    """A notebook calls several; each starts a cluster only where there is none."""
    running, starts = [False], []

    def start(*given):
        starts.append(given)
        running[0] = True

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "_is_bare", False)
    monkeypatch.setattr(cluster, "_start", start)
    monkeypatch.setattr(cluster, "_join", start)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: running[0])
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: running.__setitem__(0, False))
    assert [cluster.connect(), cluster.connect(), cluster.connect(several_trainings=True)] == [True] * 3
    cluster.leave()
    assert not running[0]
    assert not cluster.connect(several_trainings=True)
    cluster.leave()
    assert running[0]
    running[0] = False
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert not cluster.connect()
    assert starts == [(False, None), (True, None), ("head:6379",)]


def test_metrics_are_at_the_port_that_is_asked_for(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(cluster, "_is_bare", False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", lambda **options: given.update(options))
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(cluster, "_close_token", lambda: None)
    monkeypatch.setattr(cluster, "_private_folder", lambda: str(tmp_path))
    cluster.connect(metrics_port=8080)
    assert given["_metrics_export_port"] == 8080


def test_the_token_of_ray_is_for_its_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cluster._close_token()
    token = tmp_path / ".ray" / "auth_token"
    assert token.parent.stat().st_mode & 0o777 == 0o700
    token.touch(mode=0o644)
    cluster._close_token()
    assert token.stat().st_mode & 0o777 == 0o600


def test_a_token_that_cannot_be_closed_stops_no_job(tmp_path, monkeypatch):
    """A mounted secret, a home that is a file or is not there."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch()

    def refuse(path, mode):
        raise PermissionError(path)

    monkeypatch.setattr(Path, "chmod", refuse)
    for home in (tmp_path, tmp_path / ".ray" / "auth_token", tmp_path / "nowhere" / "deep"):
        monkeypatch.setenv("HOME", str(home))
        cluster._close_token()


def test_sockets_of_ray_have_short_addresses(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("deep/" * 20)))
    folder = Path(cluster._private_folder())
    session = "session_2026-11-29_20-03-45_865307_25573/sockets/plasma_store"
    assert len(str(folder / session)) < 107
    folder.parent.rmdir()


@pytest.fixture
def only_a_head(monkeypatch):
    """A cluster whose workers an autoscaler has yet to start."""
    for facts in ("cluster_resources", "available_resources"):
        monkeypatch.setattr(ray, facts, lambda: {"memory": 8e9})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {}}])
    monkeypatch.setattr(cluster.ray_state, "get_max_resources_from_cluster_config", lambda: None)


@pytest.mark.usefixtures("only_a_head")
def test_a_cluster_that_starts_from_zero_plans_with_what_may_be_added(monkeypatch):
    with pytest.raises(ResourceError, match="but the cluster has 0"):
        cluster.scaling(TrainConfig(data="d"))
    monkeypatch.setenv(cluster.LIMIT_VARIABLE, "CPU=180,GPU=4")
    assert cluster.total_resources() == {"CPU": 180, "GPU": 4}
    scaling = cluster.scaling(TrainConfig(data="d", num_workers="2"))
    assert (scaling.num_workers, scaling.use_gpu) == (2, True)
    pool = cluster.model_workers()
    assert (pool.size, pool.ready, pool.num_gpus) == (4, 1, 1)
    monkeypatch.setenv(cluster.LIMIT_VARIABLE, "CPU=32")
    pool = cluster.model_workers()
    assert (pool.size, pool.ready, pool.threads, pool.num_gpus) == (8, 1, 4, 0)


@pytest.mark.usefixtures("only_a_head")
@pytest.mark.parametrize("text", ["180", "CPU", "CPU=many", "CPU=2;GPU=1", "TPU=4", '{"CPU": 180}'])
def test_a_malformed_limit_is_an_error(monkeypatch, text):
    monkeypatch.setenv(cluster.LIMIT_VARIABLE, text)
    with pytest.raises(ConfigError, match=f"{cluster.LIMIT_VARIABLE}: expected CPU=192,GPU=4"):
        cluster.total_resources()


@pytest.mark.ray
def test_connect_joins_the_cluster_that_is_named(joined):
    assert ray.get_runtime_context().gcs_address.endswith(joined.gcs.partition(":")[2])
    assert cluster.total_resources() == {"CPU": CLUSTER_CPUS, "GPU": 0}
    cluster.connect()
    assert ray.is_initialized()


DEAD = """
import types
from bcd import cli
from bcd.runtime import cluster
cli.import_module = lambda name: types.SimpleNamespace(run=lambda config: cluster.connect())
cli.main("demo")
"""


def test_the_last_step_is_granted_a_task(monkeypatch):
    """As `cluster.connect` asks for: Ray calls the one that grants all nodes by this name."""
    from ray.data._internal.cluster_autoscaler import ClusterAutoscalerVersion

    monkeypatch.delenv("RAY_DATA_CLUSTER_AUTOSCALER", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    cluster.connect()
    assert os.environ["RAY_DATA_CLUSTER_AUTOSCALER"] in {
        version.value for version in ClusterAutoscalerVersion
    }


CONTROLLER = """
import ray
from ray.util.state import get_actor
from bcd.runtime import cluster

@ray.remote
class Controller:
    def state(self):
        found = get_actor(ray.get_runtime_context().get_actor_id(), timeout=60)
        return found and found.state

cluster.connect(several_trainings=True)
print(ray.get(Controller.remote().state.remote()))
"""


@pytest.mark.ray
@pytest.mark.trial
def test_a_controller_is_known_to_be_alive_beside_a_newer_cluster(monkeypatch):
    """As Ray Train asks for it; the other cluster has its address where Ray looks for one."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Sockets have short addresses.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        command = ["start", "--head", f"--port={free_port()}", f"--dashboard-port={free_port()}", "--block"]
        with subprocess.Popen([BIN / "ray", *command], stdout=subprocess.DEVNULL) as other:
            try:
                wait_for(lambda: any(Path(folder).rglob("ray_current_cluster")), 120, "the other cluster")
                found = subprocess.check_output([sys.executable, "-c", CONTROLLER], text=True)
            finally:
                other.terminate()
    assert found.strip() == "ALIVE"


@pytest.mark.process
def test_a_named_cluster_that_does_not_answer_is_an_error_and_not_replaced():
    environment = os.environ | {"RAY_ADDRESS": f"127.0.0.1:{free_port()}"}
    done = subprocess.run(
        [sys.executable, "-c", DEAD], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "error: no Ray cluster answers at RAY_ADDRESS=127.0.0.1:" in done.stderr


@pytest.mark.parametrize(("cpus", "asked"), [(1, 0), (2, 0.01), (64, 0.01)])
def test_what_waits_asks_for_little_but_not_for_nothing(monkeypatch, cpus, asked):
    fake(monkeypatch, cpus)
    assert cluster.waiting_cpus() == asked


def test_processes_with_a_model_draw_no_bars():
    """ScoreCAM of pytorch-grad-cam draws one for every batch."""
    code = "import tqdm; list(tqdm.tqdm(range(3)))"
    for variables, drawn in (({}, True), (cluster.MODEL_VARIABLES, False)):
        others = {name: value for name, value in os.environ.items() if name not in cluster.MODEL_VARIABLES}
        done = subprocess.run(
            [sys.executable, "-c", code], env=others | variables, capture_output=True, check=True
        )
        assert bool(done.stderr) == drawn


def test_processes_of_models_need_no_environment_where_all_have_it(monkeypatch):
    for name in cluster.MODEL_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert cluster.worker_env() == {"env_vars": cluster.MODEL_VARIABLES}
    for name, value in cluster.MODEL_VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert cluster.worker_env() == {}
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert cluster.worker_env() == {"env_vars": cluster.MODEL_VARIABLES}


@pytest.mark.ray
@pytest.mark.parametrize("has_work", [0.0, 0.5, 1.0])
def test_no_worker_ends_because_blocks_come_slowly(joined, has_work):
    """What Ray Data's autoscaler decides for two workers of which none, one or both have a block."""
    counts = {"current_size": 2, "min_size": 1, "max_size": 2, "num_pending_actors": 0}
    counts |= {"get_pool_util": has_work, "max_tasks_in_flight_per_actor": 2, "max_actor_concurrency": 1}
    pool = SimpleNamespace(**{name: lambda value=value: value for name, value in counts.items()})
    metrics = SimpleNamespace(num_inputs_received=1)
    busy = SimpleNamespace(has_completed=lambda: False, _inputs_complete=False, metrics=metrics)
    resources = SimpleNamespace(get_allocation=lambda op: None, get_op_usage=lambda op: None)
    config = ray.data.DataContext.get_current().autoscaling_config
    autoscaler = DefaultActorAutoscaler({}, resources, config=config)
    assert autoscaler._derive_target_scaling_config(pool, busy, None).delta == 0
