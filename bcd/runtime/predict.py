"""Rows to predictions: one forward pass gives probability and evidence; one row out for each row in.

The test part of a training run, archives and tiles all use this path, so that equal bytes give equal numbers.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import ActorPoolStrategy, Dataset
from ray.data.datasource import FilenameProvider
from ray.exceptions import RayError

from bcd import provenance, schema, storage
from bcd.config.evaluation import EvaluateConfig
from bcd.config.options import CLOSED_FORM, Engine
from bcd.config.scoring import ScoreConfig
from bcd.data import read
from bcd.errors import NOT_FINITE, NOT_FINITE_MESSAGE, BundleError, ConfigError
from bcd.imaging import image
from bcd.model import bundle, novelty
from bcd.model.card import LAST_LAYER, Card
from bcd.model.engines.choice import OPENVINO, TORCH
from bcd.reports import overlay
from bcd.runtime import cluster

# The largest number of float16; what exceeds it, which features of a sane network do not, becomes this.
MOST = float(np.finfo(np.float16).max)
# Columns copied from the input rows.
CARRIED = (
    *(schema.IMAGE_ID, schema.URI, schema.SLIDE, schema.PATIENT),
    *(schema.X_LEVEL0_PX, schema.Y_LEVEL0_PX, schema.TISSUE_SHARE, schema.REGION, schema.MPP),
)


@dataclass(frozen=True)
class Settings:
    """Everything besides the image that determines the numbers of a row; see `config.ScoreConfig`.

    The `model_id` is that of the bundle at the start of the job: workers load it later, and much later after
    a node is lost. So is `card_sha256`, of a job that verified the bundle's signature. `timed` rows have the
    columns of `schema.TIMES`, too.
    """

    model_uri: str
    model_id: str
    precision: str = "float32"
    batch_size: int = 32
    cam: str = CLOSED_FORM
    cam_layer: str = LAST_LAYER
    overlays: bool = False
    embeddings: bool = False
    compile: bool = False
    card_sha256: str | None = None
    timed: bool = False
    engine: Engine = TORCH

    @classmethod
    def of(cls, config: ScoreConfig | EvaluateConfig, model_id: str, **decided: Any) -> Self:
        """Those that a job was given, and what it has decided itself."""
        given = {field.name for field in fields(cls)} - decided.keys()
        return cls(config.model, model_id, **config.model_dump(include=given), **decided)

    def workers(self, limit: int | None = None) -> cluster.Pool:
        """The actors for these settings, at most `limit`."""
        return cluster.model_workers(limit, self.engine != OPENVINO)


def score_rows(dataset: Dataset, settings: Settings, max_workers: int | None = None) -> Dataset:
    """Score rows of `schema.READING`: one row of `schema.predictions` for each, a result or an error."""
    options = reading_options(read_card_of(settings), CARRIED)
    return on_models(
        dataset, Scorer, (settings,), options, settings.batch_size, settings.workers(max_workers)
    )


@contextmanager
def one_model(settings: Settings) -> Iterator[None]:
    """Context of the execution of `score_rows`; raises BundleError if the bundle has changed."""
    try:
        yield
    except RayError:
        now = bundle.identify(settings.model_uri, settings.card_sha256)
        bundle.require_same(settings.model_uri, settings.model_id, now)
        raise
    read_card_of(settings)


def read_card_of(settings: Settings) -> Card:
    """The card of the bundle; raises BundleError if it is not the one that the job began with."""
    return bundle.read_same(settings.model_uri, settings.model_id, settings.card_sha256)


def reading_options(card: Card, keep: Sequence[str]) -> dict[str, Any]:
    """Arguments of `read.pixels` for the network of a card; the columns `keep` are copied."""
    size = {"height_px": card.input_height_px, "width_px": card.input_width_px}
    return size | {"keep": keep, "stain": True}


def on_models(
    dataset: Dataset,
    worker: type,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    batch_size: int,
    pool: cluster.Pool | None = None,
) -> Dataset:
    """Pass every image to an actor that holds a model; other processes read for it meanwhile.

    Reading in threads of the same process is no faster than in one: the PNG decoder holds the interpreter.

    Args:
        dataset: rows of schema `schema.READING`.
        worker: constructed with `arguments` and a number of threads, called with rows from `read.pixels`:
            `batch_size` of them on GPUs, else those of one block.
        arguments: of the constructor.
        options: of `read.pixels`.
        pool: the actors; by default as many as the cluster has room for.
    """
    pool = pool or cluster.model_workers()
    readers = cluster.beside_models(1 if pool.num_gpus else None)
    pixels = dataset.map_batches(
        read.pixels, fn_kwargs=options, batch_size=None, batch_format="pyarrow", **readers
    )
    return pixels.map_batches(
        worker,
        fn_constructor_args=(*arguments, pool.threads),
        batch_size=batch_size if pool.num_gpus else None,
        batch_format="numpy",
        compute=ActorPoolStrategy(min_size=1, max_size=pool.size, initial_size=pool.ready),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
        runtime_env=cluster.worker_env(),
    )


class Stopwatch:
    """How much of its time a worker computes, from its first batch on."""

    def __init__(self) -> None:
        self._computed = 0.0
        self._last: float | None = None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Context of a computation."""
        started = time.monotonic()
        yield
        self._computed += time.monotonic() - started

    def lap(self) -> tuple[float, float]:
        """Seconds of computing, and all seconds, since the last call; 0 for the first batch, which waits for
        the start of others, and compiles."""
        now = time.monotonic()
        found = (0.0, 0.0) if self._last is None else (self._computed, now - self._last)
        self._computed, self._last = 0.0, now
        return found


class Scorer:
    """An actor that holds one model and scores batches; a worker of `on_models`."""

    def __init__(self, settings: Settings, threads: int) -> None:
        # Not at the top: jobs, and processes that read or write for them, do without torch.
        from bcd.model import predictor, resnet

        cluster.use_threads(threads)
        self._settings = settings
        self._stopwatch = Stopwatch()
        self._fault: BundleError | ConfigError | None = None
        try:
            self._predictor = predictor.load(
                settings.model_uri,
                precision=settings.precision,
                compiled=settings.compile,
                card_sha256=settings.card_sha256,
                engine=settings.engine,
            )
        except (
            BundleError,
            ConfigError,
        ) as error:  # raised later, because Ray would replace an actor that fails here
            self._fault = error
            return
        self._staged = self._predictor.stage(settings.batch_size)
        self._constant = {
            schema.MODEL_ID: self._predictor.model_id,
            schema.ENGINE: self._predictor.engine,
            schema.PRECISION: resnet.effective_precision(self._predictor.device, settings.precision),
            schema.BCD_VERSION: provenance.own_version(),
        }

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        """Rows of predictions, from images (n, height, width, 3) and the other columns of `read.pixels`."""
        if self._fault:
            raise self._fault
        bundle.require_same(self._settings.model_uri, self._settings.model_id, self._predictor.model_id)
        good = batch[schema.ERROR] == ""
        n = len(good)
        measured = [name for name in schema.STAIN if name in batch]
        columns = {name: pa.array(batch[name], from_pandas=True) for name in (*CARRIED, *measured)}
        for name in (schema.HEIGHT_PX, schema.WIDTH_PX):
            columns[name] = pa.array(batch[name], mask=~good)
        for name in (schema.ERROR, schema.ERROR_MESSAGE):
            columns[name] = pa.array(batch[name], pa.string(), mask=good)
        columns[schema.SHA256] = pa.array(batch[schema.SHA256], pa.string(), mask=batch[schema.SHA256] == "")
        columns |= {name: pa.array([value] * n) for name, value in self._constant.items()}
        images = batch[schema.IMAGE]
        table = self._table(columns, images if good.all() else images[good], good)
        return self._timed(table) if self._settings.timed else table

    def _timed(self, table: pa.Table) -> pa.Table:
        n = len(table)
        for field, seconds in zip(schema.TIMES, self._stopwatch.lap(), strict=True):
            table = table.append_column(field, pa.array([seconds / n] * n, field.type))
        return table

    def _table(self, columns: dict[str, pa.Array], images: np.ndarray, good: np.ndarray) -> pa.Table:
        height, width = self._predictor.evidence_size(self._settings.cam_layer)
        length = self._predictor.network.fc.in_features if self._settings.embeddings else 0
        form = schema.predictions(height, width, self._settings.overlays, length)
        # Every batch has the same shape, so that numbers do not depend on a row's neighbours.
        size = self._settings.batch_size
        parts = [self._results(images[at : at + size], form) for at in range(0, len(images), size)]
        if parts:
            results = pa.concat_tables(parts).combine_chunks()
            answered = good.copy()
            answered[good] = results[schema.PREDICTED_CLASS].is_valid()
            unanswered = pa.array(good & ~answered)
            columns[schema.ERROR] = pc.if_else(unanswered, NOT_FINITE, columns[schema.ERROR])
            columns[schema.ERROR_MESSAGE] = pc.if_else(
                unanswered, NOT_FINITE_MESSAGE, columns[schema.ERROR_MESSAGE]
            )
            place = pa.array(np.cumsum(good) - 1, mask=~answered)
            columns |= {name: results[name].combine_chunks().take(place) for name in results.column_names}
        return schema.fill(pa.table(columns), form)

    def _results(self, images: np.ndarray, form: pa.Schema) -> pa.Table:
        n = len(images)
        self._staged[:n], self._staged[n:] = images, 0
        with self._stopwatch.computing():
            prediction = self._predictor.predict(self._staged, self._settings.cam, self._settings.cam_layer)
        maps = prediction.evidence[:n]
        height, width = maps.shape[1:]
        statistics = self._predictor.card.feature_statistics
        cutoff = statistics.cutoff if statistics else None
        columns: dict[str, Any] = {
            schema.LOGIT: list(prediction.logit[:n]),
            schema.PROBABILITY: list(prediction.probability[:n]),
            schema.PROBABILITY_MALIGNANT: prediction.probability_malignant[:n],
            schema.LOG_ODDS_SD: pa.array(prediction.log_odds_sd[:n], from_pandas=True),
            schema.PREDICTED_CLASS: prediction.predicted_class[:n],
            schema.EVIDENCE: list(maps.reshape(n, -1)),
            schema.EVIDENCE_HEIGHT: [height] * n,
            schema.EVIDENCE_WIDTH: [width] * n,
            schema.EVIDENCE_BIAS: pa.array(prediction.evidence_bias[:n], from_pandas=True),
            schema.NOVELTY: pa.array(prediction.novelty[:n], from_pandas=True),
            schema.NOVELTY_CUTOFF: [cutoff] * n,
            schema.WARNINGS: [novelty.warning_codes(distance, cutoff) for distance in prediction.novelty[:n]],
        }
        if self._settings.embeddings:
            columns[schema.EMBEDDING] = list(np.clip(prediction.pooled[:n], -MOST, MOST).astype(np.float16))
        if self._settings.overlays:
            rows = zip(images, maps, prediction.finite[:n], strict=True)
            columns[schema.OVERLAY] = [self._overlay(*pair) if ok else None for *pair, ok in rows]
        return pa.table({name: pa.array(values, form.field(name).type) for name, values in columns.items()})

    def _overlay(self, pixels: np.ndarray, evidence: np.ndarray) -> bytes:
        # Log-odds share one scale over all images; the values of other methods have none.
        closed_form = self._predictor.card.cam(self._settings.cam, self._settings.cam_layer) == CLOSED_FORM
        limit = overlay.LIMIT if closed_form else overlay.scale([evidence])
        return image.encode_png(overlay.overlay(pixels, evidence, limit))


class _PartNames(FilenameProvider):
    def __init__(self, owner: str) -> None:
        self._owner = owner

    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        return f"part-{self._owner}-{write_uuid}-{task_index:06}.parquet"


def write_predictions(dataset: Dataset, uri: str, owner: str) -> None:
    """Write a predictions table as Parquet into the folder `uri`, in place of an earlier one.

    `owner`, from `output.claim_folder`, is in the names of the files; others stay.
    """
    storage.delete_files(uri, rf"part-{owner}-.*\.parquet")
    filesystem, path = storage.resolve(uri)
    names = _PartNames(owner)
    dataset.write_parquet(path, filesystem=filesystem, compression="zstd", filename_provider=names)


def read_back(uri: str, columns: list[str]) -> pa.Table:
    """Some columns of a predictions table, sorted by image."""
    return storage.dataset(uri).to_table(columns=columns).sort_by(schema.IMAGE_ID)
