"""The viewer within the service: an application of Ray Serve of its own, beside that of the model.

Tiles are many, and some are slow. In a process of their own they take no place in the queues of the model's
replicas, which count requests, and no turn of their event loops; autoscaling does not count them. It reserves
no CPU, and what reads has a lower priority than the model, for where cores are few. Its pages are those of
the model's application. No torch here.
"""

from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from bcd.config import log
from bcd.config.serving import ServeConfig, ServiceConfig
from bcd.errors import ConfigError
from bcd.serving import front, middleware
from bcd.serving.slide_jobs import jobs_of
from bcd.serving.telemetry.meter import RayMeter
from bcd.serving.viewer import scored
from bcd.serving.viewer.app import PREFIX, create_viewer
from bcd.serving.viewer.pixels import MOST_WAITING, PixelReader
from bcd.serving.viewer.scored import Outputs

NAME = "bcd-viewer"
# Of what reads, above that of the model: Ray starts all its workers with 15, and Linux has 19 at most.
NICENESS = 4


@serve.ingress()
class ViewerReplica:
    """The one process of the viewer.

    Args:
        config: of the service, with URIs that hold on this node.
        token_digest: `middleware.digest` of the token; None answers requests from this machine only.
    """

    def __init__(self, config: ServiceConfig, token_digest: str | None) -> None:
        log.hand_on("serve", config.log_format)
        self._config, self._token_digest = config, token_digest

    def __serve_build_asgi_app__(self) -> ASGIApp:
        outputs = Outputs(self._config.scores, jobs_of(self._config))
        app = front.whole_addresses(create_viewer(outputs, PixelReader(niceness=NICENESS)))
        limits, meter = front.limits_of(self._config), RayMeter()
        return middleware.guarded(app, limits, self._token_digest, meter)


def viewer(config: ServiceConfig) -> Application:
    """The application, also for serve.yaml, with the args of the model's.

    Raises:
        ConfigError: there is nothing to show.
        DataError: `--scores` is no output of a scoring job that has ended.
        StorageError: it cannot be read.
    """
    if not has_slides(config):
        raise ConfigError(
            "the viewer of a service shows what --slides and --scores name, but neither is given"
        )
    if config.scores:
        scored.open_scored(config.scores)
    options = serve.deployment(ViewerReplica).options(
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        # It bounds the tiles itself; so others are answered while they wait.
        max_ongoing_requests=2 * MOST_WAITING,
        max_queued_requests=MOST_WAITING,
    )
    # Without a token its guard answers this machine only, whatever the address is.
    return options.bind(front.placed(config), front.read_digest(config.token_file, None))


def has_slides(config: ServiceConfig) -> bool:
    """Whether a service has slides to show."""
    return bool(config.slides or config.scores)


def run(config: ServeConfig) -> None:
    """The job of `jobs/serve.py`: a model, and the viewer if there are slides to show, until SIGTERM or
    SIGINT. Raises as `serving.serve.run` and `viewer`."""
    from bcd.serving import serve as service  # brings torch

    beside = [serve.RunTarget(viewer(config), NAME, PREFIX, service.QUIET)] if has_slides(config) else []
    service.run(config, beside)
