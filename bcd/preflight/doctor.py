"""Examine a cluster before a long job: every node, and the places that the job will use.

An actor that requires no CPU runs on each node, so that busy nodes and a head without CPUs are examined, too.
A failure or timeout there becomes a line of the table, and the other checks still run.
"""

import logging
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import ray
from ray._private.utils import estimate_available_memory, get_shared_memory_bytes
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bcd import provenance, schema, storage, taxonomy
from bcd.audit import identifiers
from bcd.config.checks import DoctorConfig
from bcd.config.options import (
    HUB_WEIGHTS,
    IMAGENET_WEIGHTS,
    INPUT_PX,
    RANDOM_WEIGHTS,
    TIMM,
    Architecture,
)
from bcd.data import archive, index, manifest
from bcd.errors import BcdError, DataError, DiagnosisError, ResourceError
from bcd.preflight import diagnosis
from bcd.preflight.diagnosis import Check
from bcd.preflight.node import Action, Attempt, Capacity, Clock, ClusterFacts, Disk, Machine, Node, Sample
from bcd.runtime import cluster
from bcd.slides import slide_cache
from bcd.text import counted

logger = logging.getLogger(__name__)

# Prefix of the temporary folder in the output; hidden, so that no job reads it.
PROBE = ".bcd-doctor-"
PROBE_BYTES = 4 * 2**20
# Inputs that are searched for what may identify a patient.
SAMPLED = 20
# Round trips, of which the fastest measures the clock.
PINGS = 5
# A small request that Ray's control service rejects without a token, where tokens are required.
QUESTION = "/ray.rpc.NodeInfoGcsService/GetClusterId"
UNAUTHENTICATED_TIMEOUT_S = 10
KINDS = ("CPU", "GPU")
# By node id.
Attempts = dict[str, Attempt]


def run(config: DoctorConfig) -> list[Check]:
    """Examine, print the table, and return its checks; raises DiagnosisError for a fault."""
    checks = examine(config)
    job = f"jobs/{config.purpose}.py"
    width = shutil.get_terminal_size((diagnosis.WIDEST, 24)).columns
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    logger.info("\n".join(["", *diagnosis.table_lines(checks, width, coloured), ""]))
    if without := config.not_given():
        logger.info(f"not checked, because not given: {', '.join(without)}")
    sentence = diagnosis.verdict(checks, job)
    if any(check.verdict == "fault" for check in checks):
        raise DiagnosisError(sentence)
    logger.info(sentence)
    return checks


def examine(config: DoctorConfig) -> list[Check]:
    """All checks; only one where no cluster can be joined."""
    try:
        cluster.connect()
    except BcdError as error:
        step = "Start the cluster, or check that RAY_ADDRESS and the token are those of this one."
        return [Check("cluster", "fault", str(error), step)]
    return diagnosis.diagnose(gather(config))


def gather(config: DoctorConfig) -> ClusterFacts:
    """Examine every node that Ray considers alive."""
    known = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    logger.info(f"examining {counted(len(known), 'node')} for jobs/{config.purpose}.py")
    everyone = Party(
        {
            name: _examiner(name, config.architecture, node["Resources"].get("GPU", 0) > 0)
            for name, node in known.items()
        },
        config.timeout_s,
    )
    machines, troubles = everyone.call({name: one.machine.remote() for name, one in everyone.members.items()})
    party = Party({name: everyone.members[name] for name in machines}, config.timeout_s)
    clocks = {name: _clock(one, config.timeout_s) for name, one in party.members.items()}
    attempts = [answer for flag, uri in config.given().items() for answer in _attempts(party, flag, uri)]
    names = _names(known)
    nodes = [
        Node(
            name=names[node_id],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            object_store_bytes=int(node["Resources"].get("object_store_memory", 0)),
            machine=machines.get(node_id),
            trouble=troubles.get(node_id, ""),
            clock=clocks.get(node_id, Clock()),
            attempts=tuple(answers[node_id] for answers in attempts if node_id in answers),
        )
        for node_id, node in known.items()
    ]
    address = ray.get_runtime_context().gcs_address
    return ClusterFacts(
        address=address,
        rejects_unauthenticated=rejects_unauthenticated(address),
        versions=provenance.versions(),
        may_use_gpus=config.device != "cpu",
        stages_slides_bytes=slide_cache.CACHE_BYTES if storage.is_remote(config.input or "") else 0,
        capacity=_capacity(config),
        nodes=nodes,
        sample=_sample(party, config.input),
    )


@dataclass(frozen=True)
class Party:
    """Examiners by node id, and the timeout of an answer."""

    members: Mapping[str, Any]
    timeout_s: float

    def call(self, calls: Mapping[str, ray.ObjectRef]) -> tuple[dict[str, Any], dict[str, str]]:
        """The answers by node, and the troubles of nodes without one."""
        answers, troubles = {}, {}
        done = set(ray.wait(list(calls.values()), num_returns=len(calls), timeout=self.timeout_s)[0])
        for name, call in calls.items():
            if call not in done:
                troubles[name] = f"no answer within {self.timeout_s:g} s"
                continue
            try:
                answers[name] = ray.get(call)
            except RayError as error:
                troubles[name] = _reason(error)
        return answers, troubles

    def attempt(self, flag: str, action: Action, uris: Mapping[str, str]) -> Attempts:
        """Let nodes attempt an action, each at its URI, at the same time."""
        if not uris:
            return {}
        calls = {name: self.members[name].attempt.remote(flag, action, uri) for name, uri in uris.items()}
        answers, troubles = self.call(calls)
        return answers | {
            name: Attempt(flag, action, uris[name], error=_naming(uris[name], trouble))
            for name, trouble in troubles.items()
        }


class Examiner:
    """The actor on one node."""

    def __init__(self, architecture: Architecture, has_gpus: bool) -> None:
        self._architecture, self._has_gpus = architecture, has_gpus

    def machine(self) -> Machine:
        """Facts about this node."""
        return Machine(
            provenance.versions(),
            estimate_available_memory(),
            get_shared_memory_bytes(),
            _disk(Path(ray.get_runtime_context().get_temp_dir())),
            _disk(slide_cache.CACHE),
            _torch_gpus() if self._has_gpus else 0,
        )

    def clock(self) -> float:
        """Seconds since 1970 by the clock of this node."""
        return time.time()

    def attempt(self, flag: str, action: Action, uri: str) -> Attempt:
        """Attempt an action, and measure its duration."""
        started = time.perf_counter()
        try:
            place, n_bytes = self._perform(flag, action, uri)
        except BcdError as error:
            return Attempt(flag, action, uri, error=_naming(uri, str(error)))
        return Attempt(flag, action, place, time.perf_counter() - started, n_bytes)

    def sample(self, uri: str) -> Sample:
        """What may identify a patient in some of the inputs."""
        try:
            places = _first_inputs(uri)
            found = [*identifiers.in_names(places)]
            for name, place in places.items():
                found += identifiers.in_stored(name, place)
        except BcdError:  # which reading an image reports
            return Sample(0, ())
        return Sample(len(places), found)

    def _perform(self, flag: str, action: Action, uri: str) -> tuple[str, int]:
        """The URI that was used, and the bytes read or written."""
        match action:
            case "find":
                return _find(flag, uri), 0
            case "read" | "see":
                return uri, len(storage.read_start(uri, PROBE_BYTES))
            case "write":
                storage.write_bytes(uri, os.urandom(PROBE_BYTES))
                return uri, PROBE_BYTES
            case "delete":
                storage.delete_folder(uri)
            case "load":
                _load(self._architecture, flag, uri)
            case _:
                raise KeyError(action)
        return uri, 0


def _torch_gpus() -> int:
    # Not at the top: it takes seconds on every node.
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _naming(uri: str, error: str) -> str:
    # With the request's id, the same error on many nodes would be many errors.
    error = re.sub(r" \(Request ID: \w+\)", "", error)
    return error if uri in error else f"{uri}: {error}"


def _disk(path: Path) -> Disk:
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    usage = shutil.disk_usage(there)
    return Disk(str(path), usage.total, usage.free)


def _find(flag: str, uri: str) -> str:
    """One of the images that a flag names."""
    if manifest.is_one(uri):
        return manifest.inputs(manifest.read_manifest(uri), copies=True)[schema.URI][0].as_py()
    if storage.is_file(uri):
        return uri
    suffixes = archive.SUFFIXES if flag == "--input" else index.IMAGE_SUFFIXES
    found = next(storage.first_files(uri, suffixes), None)
    if found is None:
        raise DataError(f"{uri}: nothing to read below it; expected {', '.join(suffixes)} files")
    return found.uri


def _first_inputs(uri: str) -> dict[str, str]:
    """URIs of the first inputs, by name."""
    if manifest.is_one(uri):
        rows = manifest.inputs(manifest.read_manifest(uri), copies=True).slice(0, SAMPLED)
        return dict(zip(rows[schema.IMAGE_ID].to_pylist(), rows[schema.URI].to_pylist(), strict=True))
    if storage.is_file(uri):
        return {uri.rpartition("/")[2]: uri}
    found = storage.first_files(uri, archive.SUFFIXES)
    return {file.path: file.uri for file in islice(found, SAMPLED)}


def _load(architecture: Architecture, flag: str, uri: str) -> None:
    # Not at the top: see `_torch_gpus`.
    from bcd.model import predictor, weights
    from bcd.model.networks import timm_weights

    if flag == "--weights":
        size = INPUT_PX
        if architecture.startswith(TIMM):
            stated = timm_weights.stated(architecture, uri)
            size = stated.height_px, stated.width_px
        given = weights.pretrained(uri, architecture, size)
        weights.build(len(taxonomy.TUMOR_CLASSES), given, architecture=architecture, size_px=size)
    else:
        predictor.load(uri, "cpu")


def _examiner(node_id: str, architecture: Architecture, has_gpus: bool) -> Any:
    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    # Threads: a request that hangs does not block the others.
    options = {"num_cpus": 0, "max_concurrency": 8, "scheduling_strategy": where}
    return ray.remote(Examiner).options(**options).remote(architecture, has_gpus)


def _clock(examiner: Any, timeout_s: float) -> Clock:
    """A node's clock relative to ours, to within half a round trip."""
    best = Clock(error_s=timeout_s)
    for _ in range(PINGS):
        sent = time.time()
        try:
            there = ray.get(examiner.clock.remote(), timeout=timeout_s)
        except RayError:
            return best
        received = time.time()
        pinged = Clock(there - (sent + received) / 2, (received - sent) / 2)
        best = min(best, pinged, key=lambda clock: clock.error_s)
    return best


def _attempts(party: Party, flag: str, uri: str) -> list[Attempts]:
    """The nodes' attempts at the place that a flag names."""
    if not party.members or (flag == "--weights" and uri == RANDOM_WEIGHTS):
        return []
    is_download = flag == "--weights" and (uri == IMAGENET_WEIGHTS or uri.startswith(HUB_WEIGHTS))
    place = uri if is_download else storage.absolute(uri)
    everywhere = dict.fromkeys(party.members, place)
    # Actions for all nodes run on the node where the job is started.
    here = ray.get_runtime_context().get_node_id()
    one = {here if here in everywhere else next(iter(everywhere)): place}
    match flag:
        case "--output":
            return _probe(party, flag, place)
        case "--weights":  # the job hands them to its workers
            return [party.attempt(flag, "load", one)]
        case "--model":
            return [party.attempt(flag, "load", everywhere)]
    found = party.attempt(flag, "find", one)
    (sample,) = found.values()
    return [found if sample.error else party.attempt(flag, "read", dict.fromkeys(everywhere, sample.uri))]


def _sample(party: Party, uri: str | None) -> Sample | None:
    """The sample of the inputs, read on one node; None without one."""
    if uri is None or not party.members:
        return None
    examiner = next(iter(party.members))
    answers, _ = party.call({examiner: party.members[examiner].sample.remote(storage.absolute(uri))})
    found = answers.get(examiner)
    return found if found and found.n_inputs else None


def _probe(party: Party, flag: str, uri: str) -> list[Attempts]:
    """Every node writes a file and reads that of another; then all are deleted."""
    folder = storage.join(uri, f"{PROBE}{uuid.uuid4().hex}")
    files = {name: storage.join(folder, name) for name in party.members}
    seen: Attempts = {}
    deleted: Attempts = {}
    try:
        written = party.attempt(flag, "write", files)
        whole = [name for name, one in written.items() if not one.error]
        # Each reads the file of the next one; a single node its own.
        others = {name: files[other] for name, other in zip(whole, whole[1:] + whole[:1], strict=True)}
        seen = party.attempt(flag, "see", others)
    finally:
        # In turn, because on a shared disk concurrent nodes would delete the same files. On every node,
        # because a failed write may leave something; reported for nodes whose write succeeded.
        for name in party.members:
            deleted |= party.attempt(flag, "delete", {name: folder})
    reported = [written, seen, {name: deleted[name] for name in whole}]
    return [{name: _of_output(one, uri, folder) for name, one in some.items()} for some in reported]


def _of_output(attempt: Attempt, uri: str, folder: str) -> Attempt:
    """The attempt as one on OUTPUT itself, without the name of the temporary folder."""
    below = folder.removeprefix(uri)
    error = attempt.error
    for file in (attempt.uri.removeprefix(uri), below):
        error = error.replace(file, "")
    return replace(attempt, uri=uri, error=error)


def _capacity(config: DoctorConfig) -> Capacity:
    there, free = (
        {kind: resources.get(kind, 0.0) for kind in KINDS}
        for resources in (ray.cluster_resources(), ray.available_resources())
    )
    try:
        plan, needed = _plan(config)
    except ResourceError as error:
        return Capacity(there, cluster.total_resources(), free, refusal=str(error))
    return Capacity(there, cluster.total_resources(), free, needed, plan)


def _plan(config: DoctorConfig) -> tuple[str, dict[str, float]]:
    """What the job would start, and its least resources, by the job's own calculation."""
    wants_gpu = float(config.device == "gpu")
    if config.purpose == "train":
        scaling = cluster.scaling(config.training())
        workers = scaling.num_workers
        low = workers if isinstance(workers, int) else workers[0]
        plan = f"{counted(low, 'training worker')} and {cluster.DATA_CPUS} CPU for reading"
        cpus = cluster.training_cpus(low, bool(scaling.use_gpu))
        return plan, {"CPU": float(cpus), "GPU": float(low * scaling.use_gpu)}
    if config.purpose == "score":
        pool = cluster.model_workers()
        needed = {"CPU": float(pool.num_cpus), "GPU": max(wants_gpu, pool.num_gpus)}
        return f"up to {counted(pool.size, 'model worker')}", needed
    replicas = 1 if config.num_workers == "auto" else int(config.num_workers)
    return f"a service of {counted(replicas, 'replica')}", {"CPU": float(replicas), "GPU": wants_gpu}


def rejects_unauthenticated(address: str) -> bool | None:
    """Whether a cluster's control port rejects requests without a token; None where it does not answer."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(QUESTION)(b"", timeout=UNAUTHENTICATED_TIMEOUT_S)
        except grpc.RpcError as error:
            return True if error.code() == grpc.StatusCode.UNAUTHENTICATED else None
    return False


def _names(nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The address of each node; where several share one, with the start of its id."""
    addresses = [node["NodeManagerAddress"] for node in nodes.values()]
    return {
        name: address if addresses.count(address) == 1 else f"{address} ({name[:6]})"
        for name, address in zip(nodes, addresses, strict=True)
    }


def _reason(error: RayError) -> str:
    """The last line of Ray's message, which names the cause."""
    return str(error).strip().splitlines()[-1].strip()
