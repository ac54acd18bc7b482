"""A model over HTTP with Ray Serve: `app` builds its application, `run` serves it with what is beside it.

A replica decodes and computes off the event loop. While it computes a batch, requests that are decoded wait
at the gate and then form the next batch. So no request waits for a timer, nor for an image that takes long to
decode: a single one is computed at once, and under load batches fill by themselves.
"""

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from starlette.types import ASGIApp

from bcd import storage
from bcd.config import log
from bcd.config.options import CLOSED_FORM, Engine
from bcd.config.serving import ServeConfig, ServiceConfig
from bcd.errors import NOT_FINITE_MESSAGE, BundleError, ConfigError, ResourceError
from bcd.imaging import child, decoder, image
from bcd.model import bundle, predictor
from bcd.model.card import model_id
from bcd.model.engines.choice import OPENVINO, TORCH, choose_engine
from bcd.model.predictor import Prediction
from bcd.preflight import signing
from bcd.runtime import cluster
from bcd.serving import api, front, middleware
from bcd.serving.receive import MODELS
from bcd.serving.slide_jobs import SlideJobs, SlideRunner, jobs_of
from bcd.serving.telemetry import signals
from bcd.serving.telemetry.meter import RayMeter

logger = logging.getLogger(__name__)

OTHER_MODES = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")
NAME = "bcd"
# A replica is ready if a forward pass succeeded at most this long ago.
READY_FOR_S = 10.0
READY_TIMEOUT_S = 20.0
# Images in one forward pass on a CPU: more take as much longer as they are more. torch converts the weights
# to bfloat16 for each.
MOST_ON_CPUS = {TORCH: 2, OPENVINO: 1}
QUIET = {"log_level": "WARNING", "enable_access_log": False}
# The image as sent, and its prediction.
Seen = tuple[np.ndarray, Prediction]


class Gate:
    """Admits requests to the batcher only while the model is idle, one batch at a time.

    `@serve.batch` closes a batch when its time is up, even while the model is busy: without a gate most
    batches under load would have one request.
    """

    def __init__(self, size: int) -> None:
        self._size, self._busy = size, False
        self._waiting: deque[asyncio.Future[None]] = deque()

    def __len__(self) -> int:
        """How many requests wait."""
        return sum(not place.done() for place in self._waiting)

    async def enter(self) -> None:
        """Wait until the model is idle."""
        if self._busy or self._waiting:
            place = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            try:
                await place
            except asyncio.CancelledError:
                if place.done() and not place.cancelled():
                    self.pass_on()
                raise

    def pass_on(self) -> None:
        """Admit the next request in place of one that was admitted and has left.

        Ray drops a batch that all requests have left before it begins: it never ends, so it opens no gate.
        """
        if not self._busy:
            self._let_in(1)

    def close(self) -> None:
        """Begin a batch."""
        self._busy = True

    def open(self) -> None:
        """End a batch."""
        self._busy = False
        self._let_in(self._size)

    def _let_in(self, n: int) -> None:
        while n and self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                n -= 1


@serve.ingress()
class Replica:
    """One copy of the model, and the HTTP interface in front of it: an `api.Engine`.

    Args:
        config: of the service.
        token_digest: `middleware.digest` of the token; None answers requests from this machine only.
        model_id: of the deployed model; a replica that starts later rejects any other.
        card_sha256: of its card, if its signature was verified; a replica loads no other.
        n_models: of the service.
        engine: what computes the network, `torch` or `openvino`.
    """

    def __init__(
        self,
        config: ServiceConfig,
        token_digest: str | None,
        model_id: str,
        card_sha256: str | None = None,
        n_models: int = 1,
        engine: Engine = TORCH,
    ) -> None:
        threads = min(cluster.CPUS_PER_MODEL, cluster.cores())
        if n_models * config.max_replicas > 1:  # together they use no more cores than they reserve
            threads = max(1, int(config.num_cpus))
        cluster.use_threads(threads)
        log.hand_on("serve", config.log_format)
        self._config, self._token_digest = config, token_digest
        self._record = RayMeter(model=config.name)
        # Ray shows all GPUs to a process that reserves none: every replica would use the first.
        device = None if config.num_gpus else "cpu"
        self._predictor = predictor.load(
            config.model, device, config.precision, card_sha256=card_sha256, engine=engine
        )
        bundle.require_same(config.model, model_id, self._predictor.model_id)
        self.card, self.model_id = self._predictor.card, self._predictor.model_id
        self._decoders = ThreadPoolExecutor(threads, "decode")
        # One at a time: those that take long would hold up the others, and need most memory.
        self._patient = ThreadPoolExecutor(1, "decode slowly")
        self._computer = ThreadPoolExecutor(1, "compute")
        most = config.max_batch_size if config.num_gpus else MOST_ON_CPUS[engine]
        self._batch_size = min(config.max_batch_size, most)
        self._gate = Gate(self._batch_size)
        self._succeeded = -READY_FOR_S
        canary = np.zeros((*self.card.input_size_px, 3), np.uint8)
        self._canary = image.encode_png(canary)
        for n in {1, self._batch_size}:  # a replica that cannot compute does not become healthy
            prediction = self._computer.submit(self._predictor.predict, np.stack([canary] * n)).result()
            if not prediction.finite.all():
                raise BundleError(f"{config.model}: {NOT_FINITE_MESSAGE}")

    def __serve_build_asgi_app__(self) -> ASGIApp:
        self._forward.set_max_batch_size(self._batch_size)
        limits, slides = front.limits_of(self._config), jobs_of(self._config)
        self._slides = _runner(self._config, slides).start() if slides else None
        named = api.Named(self._config.name, tuple(self._config.named_models), self._record)
        app = api.create_app(self, limits, self._config.max_images, slides, named)
        return middleware.guarded(front.whole_addresses(app), limits, self._token_digest, self._record)

    def check_health(self) -> None:
        """Ray Serve replaces a replica of which this raises: one that would leave slides waiting for ever."""
        if self._slides and not self._slides.is_alive():
            raise RuntimeError("the thread that scores slides has ended")

    async def look(self, content: bytes) -> Seen:
        """See `api.Engine`."""
        try:
            pixels, fitted = await self._decode(self._decoders, content, child.QUICK)
        except image.ImageError as error:
            if error.code != "too_slow":
                raise
            pixels, fitted = await self._decode(self._patient, content, child.PATIENT)
        return pixels, await self._in_batch(fitted)

    async def _in_batch(self, fitted: np.ndarray) -> Prediction:
        arrived = time.monotonic()
        self._record(signals.QUEUE_IMAGES, 1 + len(self._gate))
        try:
            await self._gate.enter()
        finally:
            self._record(signals.QUEUE_IMAGES, len(self._gate))
            self._record(signals.QUEUE_SECONDS, time.monotonic() - arrived)
        try:
            return await self._forward(fitted)
        except asyncio.CancelledError:
            self._gate.pass_on()
            raise

    async def ready(self) -> bool:
        """See `api.Engine`."""
        if time.monotonic() - self._succeeded > READY_FOR_S:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(READY_TIMEOUT_S):
                    await self.look(self._canary)
        return time.monotonic() - self._succeeded <= READY_FOR_S

    @serve.batch(batch_wait_timeout_s=0.0, max_concurrent_batches=1)
    async def _forward(self, fitted: list[np.ndarray]) -> list[Prediction]:
        self._gate.close()
        try:
            return await self._predict(fitted)
        finally:
            self._gate.open()

    async def _predict(self, fitted: list[np.ndarray]) -> list[Prediction]:
        loop, begun = asyncio.get_running_loop(), time.monotonic()
        prediction = await loop.run_in_executor(self._computer, self._predictor.predict, np.stack(fitted))
        self._record(signals.BATCH_SECONDS, time.monotonic() - begun)
        self._record(signals.BATCH_IMAGES, len(fitted))
        # The weights were finite when they were loaded: a replica with other logits now is broken.
        self._succeeded = time.monotonic() if prediction.finite.all() else -READY_FOR_S
        return prediction.rows()

    async def _decode(
        self, threads: ThreadPoolExecutor, content: bytes, budget: child.Budget
    ) -> tuple[np.ndarray, np.ndarray]:
        """The image as sent, and as input of the network."""

        def decoded() -> tuple[np.ndarray, np.ndarray]:
            pixels = decoder.decode_safely(content, budget)
            return pixels, self._predictor.fit(pixels)

        return await asyncio.get_running_loop().run_in_executor(threads, decoded)


def app(config: ServiceConfig) -> Application:
    """`create_application` for `serve run bcd.serving.serve:app model=URI` and for serve.yaml."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return create_application(config, client.http_config.host if client else None, 1 + len(config.models))


def create_application(config: ServiceConfig, host: str | None, n_models: int = 1) -> Application:
    """The application of one of `n_models` behind an address, None where that is not known yet.

    Raises:
        ConfigError: other machines reach the address, and there is no token; or the engine is not installed,
            or cannot draw the evidence maps of this model.
        BundleError: there is no model, or not the signature that is required.
        StorageError: the model cannot be read, or slides cannot be kept.
    """
    config = config.model_copy(update={"model": storage.pinned(config.model)})
    if config.slides:
        storage.require_writable(config.slides)
    card_sha256 = signing.verified(config.model, config.require_signature)
    card = bundle.read_card(config.model, card_sha256)
    # Here, so that all replicas have the same.
    engine = choose_engine(config.engine, card.architecture, card.cam(CLOSED_FORM), config.num_gpus > 0)
    token_digest = front.read_digest(config.token_file, host)
    replicas: dict[str, Any] = {"num_replicas": config.min_replicas}
    if config.max_replicas > config.min_replicas:
        bounds = {"min_replicas": config.min_replicas, "max_replicas": config.max_replicas}
        replicas = {"autoscaling_config": bounds | {"target_ongoing_requests": config.max_batch_size}}
    options = serve.deployment(Replica).options(
        **replicas,
        ray_actor_options={
            "num_cpus": config.num_cpus,
            "num_gpus": config.num_gpus,
            "runtime_env": cluster.worker_env(),
        },
        # The next batch gathers and is decoded while one is computed.
        max_ongoing_requests=2 * config.max_batch_size,
        max_queued_requests=config.max_queued,
    )
    return options.bind(front.placed(config), token_digest, model_id(card), card_sha256, n_models, engine)


def beside_default(config: ServeConfig) -> list[serve.RunTarget]:
    """The other models of a service, each an application with replicas and a queue of its own, so that one
    that fails or is slow leaves the others alone. Raises as `create_application`."""
    alone = {"models": (), "slides": None, "archive": None, "scores": None}
    targets = []
    for name, uri in config.named_models.items():
        one = config.model_copy(update=alone | {"name": name, "model": uri})
        application = create_application(one, config.host, 1 + len(config.models))
        targets.append(serve.RunTarget(application, f"{NAME}-model-{name}", f"{MODELS}/{name}", QUIET))
    return targets


def _runner(config: ServiceConfig, jobs: SlideJobs) -> SlideRunner:
    """Scores slides as `jobs/score.py` does, on the cluster of this replica."""
    flags = ["--model", config.model, "--precision", config.precision, "--engine", config.engine]
    if config.require_signature:
        flags += ["--require-signature", config.require_signature]
    return SlideRunner(jobs, flags, {"RAY_ADDRESS": ray.get_runtime_context().gcs_address})


def run(config: ServeConfig, beside: Sequence[serve.RunTarget] = ()) -> None:
    """Serve until SIGTERM or SIGINT, then finish the accepted requests; `beside` are more applications."""
    _require_plain_serve()
    if config.metrics_port and "RAY_ADDRESS" in os.environ:
        raise ConfigError(
            "--metrics-port is for a cluster that this job starts, but RAY_ADDRESS names one; start its "
            "nodes with ray start --metrics-export-port instead"
        )
    config = config.model_copy(update={"model": storage.pinned(config.model)})
    application = create_application(config, config.host, 1 + len(config.models))
    others = beside_default(config)
    front.require_free(config.host, config.port)
    # For the proxy of a cluster that we start; the proxy of a running cluster has its own environment.
    os.environ[middleware.PROXY_VARIABLE] = middleware.PROXY_CALLBACK
    os.environ[middleware.LIMITS_VARIABLE] = front.limits_of(config).model_dump_json()
    if token_digest := front.read_digest(config.token_file, config.host):
        os.environ[middleware.DIGEST_VARIABLE] = token_digest
    cluster.connect(metrics_port=config.metrics_port)
    _require_capacity(config)
    # Ray Serve logs every step; we print what users need.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    http = HTTPOptions(host=config.host, port=config.port)
    serve.start(http_options=http, logging_config=QUIET)
    targets = [serve.RunTarget(application, NAME, logging_config=QUIET), *others, *beside]
    serve.run_many(targets)
    stop = threading.Event()
    # After the start of Ray, which sets handlers of its own.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    logger.info(f"serving {config.model} at http://{config.host}:{config.port} (stop with Ctrl-C)")
    stop.wait()
    logger.info("finishing accepted requests")
    for target in targets:
        serve.delete(target.name)
    if "RAY_ADDRESS" in os.environ:
        # A cluster of ours ends with this process. Here Ray 2.60 waits for a task of the controller that it
        # kills, and prints that the task has infinite retries.
        serve.shutdown()


def _require_plain_serve() -> None:
    """Reject modes of Ray Serve in which requests pass by our limits and our token."""
    for name in OTHER_MODES:
        if os.environ.get(name, "0").lower() not in ("0", "false", ""):
            raise ConfigError(
                f"{name} is set: in that mode of Ray Serve requests reach replicas past the limits of this "
                "service; unset it"
            )


def _require_capacity(config: ServeConfig) -> None:
    """Reject what the cluster does not have: Serve would wait for ever."""
    have, n_models = cluster.total_resources(), 1 + len(config.models)
    # The job that scores a slide takes one for its model, and a part of another.
    if config.slides and config.num_cpus * config.max_replicas * n_models + 1 >= have["CPU"]:
        raise ResourceError(
            f"--slides requires more than one CPU besides those of the replicas, but the cluster has "
            f"{have['CPU']:g}; lower --num-cpus, or score slides with jobs/score.py"
        )
    for kind, each in (("CPU", config.num_cpus), ("GPU", config.num_gpus)):
        if n_models * each * config.min_replicas > have[kind]:
            models = f" for each of {n_models} models" if n_models > 1 else ""
            raise ResourceError(
                f"--min-replicas {config.min_replicas} of {each:g} {kind} each{models} do not fit: "
                f"the cluster has {have[kind]:g}; lower --min-replicas or --num-{kind.lower()}s"
            )
