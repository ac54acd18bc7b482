"""Settings of the service and of the viewer."""

import re

import tyro
from pydantic import Field, model_validator

from bcd.config.options import Config, Engine, Precision
from bcd.config.signing import SignedConfig

NAME = r"^[a-z0-9][a-z0-9_-]{0,31}$"


class RequestConfig(Config):
    """Limits of the requests of a service, and the pages that may send them."""

    max_body_bytes: int = Field(default=32 * 2**20, ge=1)
    """Largest request body in bytes; a larger one is answered 413 while it is read."""

    upload_timeout_s: float = Field(default=30, gt=0)
    """Seconds in which a request body must have arrived, else 408."""

    answer_timeout_s: float = Field(default=60, gt=0)
    """Seconds in which a request must be answered, else 504."""

    slides: str | None = None
    """Folder for whole slides that callers send to /v1/slides, and for their results: local (of every node),
    s3:// or gs://. Without it the service scores single fields only."""

    max_slide_bytes: int = Field(default=8 * 2**30, ge=1)
    """Largest slide that is received, in bytes."""

    cors_origins: tuple[str, ...] = ()
    """Origins, such as https://viewer.example.org, whose web pages may call this service; by default none but
    its own page."""

    @model_validator(mode="after")
    def _origins_are_named(self) -> "RequestConfig":
        for origin in self.cors_origins:
            if not re.fullmatch(r"https?://[\w.:\[\]-]+", origin):
                raise ValueError(
                    f"--cors-origins {origin}: expected a scheme and a host, as https://HOST:PORT"
                )
        return self


class ServiceConfig(RequestConfig, SignedConfig):
    """Settings of `serve run bcd.serving.serve:app model=URI`, and the args in serve.yaml."""

    model: str
    """The model bundle: a local folder, s3://, gs:// or hf://OWNER/NAME[@REVISION]."""

    name: str = Field(default="default", pattern=NAME)
    """Name of the model, which answers at /v1/models/NAME, too."""

    models: tuple[str, ...] = ()
    """More bundles, as NAME=URI: each answers at /v1/models/NAME, by processes of its own with the settings
    of --model."""

    token_file: str | None = None
    """File with the token that callers of /v1 must send; by default the variable BCD_API_TOKEN. Without
    either, only this machine is answered."""

    precision: Precision = "float32"
    """float32 gives the numbers of the scoring job; bfloat16 is several times faster on fitting hardware."""

    engine: Engine = "auto"
    """What computes the network. auto: OpenVINO (extra `openvino`) for ResNets, where it is installed and
    --num-gpus is 0, else torch. All replicas have the same."""

    max_batch_size: int = Field(default=8, ge=1)
    """Largest number of images in one forward pass. Replicas without GPUs have at most 2, and 1 by OpenVINO,
    because more gain nothing there. A single request never waits for others."""

    min_replicas: int = Field(default=1, ge=1)
    """Replicas of the model that always run."""

    max_replicas: int = Field(default=1, ge=1)
    """Replicas of the model under load."""

    num_cpus: float = Field(default=1, gt=0)
    """CPUs that a replica reserves in the cluster; if --max-replicas is above 1, also its threads."""

    num_gpus: float = Field(default=0, ge=0)
    """GPUs of a replica; 0.25 lets four replicas share one, 0 computes on CPUs."""

    max_queued: int = Field(default=16, ge=1)
    """Requests that wait while every replica has two batches; more are answered 503 with Retry-After."""

    max_images: int = Field(default=16, ge=1)
    """Largest number of images in one request to /v1/predict/batch."""

    archive: str | None = None
    """Folder whose slides callers of /v1/slides may name in place of sending them."""

    scores: str | None = None
    """The --output of a scoring job, which the viewer of the service shows at /slides."""

    max_slides: int = Field(default=16, ge=1)
    """Slides that wait to be scored, one after the other; more are answered 503."""

    @property
    def named_models(self) -> dict[str, str]:
        """URIs of `models` by name."""
        return dict(part.split("=", 1) for part in self.models)

    @model_validator(mode="after")
    def _models_have_names(self) -> "ServiceConfig":
        names = [self.name]
        for part in self.models:
            name, _, uri = part.partition("=")
            if not re.fullmatch(NAME, name) or not uri:
                raise ValueError(
                    f"--models {part}: expected NAME=URI, a name of at most 32 small letters, digits, - and _"
                )
            names.append(name)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two models have the name {twice[0]}; choose others in --name and --models")
        return self

    @model_validator(mode="after")
    def _engine_fits_the_device(self) -> "ServiceConfig":
        if self.engine == "openvino" and self.num_gpus:
            raise ValueError(
                "--engine openvino computes on CPUs: leave out --num-gpus, or use --engine torch"
            )
        return self

    @model_validator(mode="after")
    def _archive_has_a_place_for_results(self) -> "ServiceConfig":
        if self.archive is not None and self.slides is None:
            raise ValueError("--archive requires --slides, the folder for the results")
        return self

    @model_validator(mode="after")
    def _bounds_in_order(self) -> "ServiceConfig":
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"--max-replicas {self.max_replicas} is less than --min-replicas {self.min_replicas}"
            )
        return self


class ServeConfig(ServiceConfig):
    """Answer requests over HTTP and serve a web page. Runs until SIGTERM or Ctrl-C."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than loopback requires a token."""

    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""

    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """Port with metrics for Prometheus, of Ray and of bcd, for all who reach this machine, without a token;
    by default one that Ray chooses. Nodes of a running cluster have that of their `ray start`."""


class ViewConfig(Config):
    """Show a scored archive in a browser: its slides under their maps, fields, and all numbers.

    Runs until SIGTERM or Ctrl-C. It reads the output of a scoring job, and the slides and images that its
    table names; it uses no model and no cluster, and writes nothing but the cache of slides from stores.
    """

    output: tyro.conf.Positional[str]
    """The --output of a scoring job: a local folder, s3:// or gs://."""

    at: str | None = None
    """An image_id of the table, or the name of a slide: the printed address opens this one."""

    token_file: str | None = None
    """File with the token that the page must ask for; by default the variable BCD_API_TOKEN. Without either,
    only this machine is answered."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than loopback requires a token."""

    port: int = Field(default=8001, ge=1, le=65535)
    """Port to listen on."""
