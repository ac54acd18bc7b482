"""Train attention over the tiles of labelled slides, or apply it: from embeddings to answers for slides.

scored slides -> labels -> split -> check: no leak -> train -> temperature, threshold
-> answers and attention of every slide -> metrics by patient, beside what needs no training
"""

import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.train import ScalingConfig

from bcd import lease, provenance, schema, storage
from bcd.config import log
from bcd.config.scoring import PoolConfig
from bcd.errors import BcdError, BundleError, DataError, DivergedError
from bcd.lease import Lease
from bcd.runtime import cluster, run_directory
from bcd.runtime.prepare import part_of
from bcd.split import split
from bcd.taxonomy import PARTS, TUMOR_CLASSES, VALIDATION
from bcd.text import counted, without_folders
from bcd.training import export, train
from bcd.training.pooling import answers, bags, labels, model
from bcd.training.pooling.labels import LabelledSlides
from bcd.training.pooling.model import Fitted

logger = logging.getLogger(__name__)

# The share of malignant slides in an epoch, which weighs both classes alike.
EQUAL = 0.5
METRICS, SLIDES, ATTENTION = "metrics.json", "slides.parquet", "attention.parquet"
# Settings that name places, of which others see the last part only.
PLACES = ("scores", "labels", "output")


@dataclass(frozen=True)
class PoolTask:
    """What the training worker is given."""

    config: PoolConfig
    scores: str
    slides: pa.Table


def run(config: PoolConfig) -> str:
    """Train or apply, and return the URI of the run directory; a finished run is left as it is.

    Raises:
        BcdError: an error for the user, before any long work where possible.
    """
    uri = storage.join(config.output, config.name)
    if not run_directory.begin_run(config, uri):
        with lease.held(uri, config.wait) as own:
            # Another job may have finished it meanwhile.
            if not run_directory.begin_run(config, uri):
                _complete(config, uri, own)
    logger.info(f"{uri} is finished: see {SLIDES} and {ATTENTION} there, or choose another --name")
    return uri


def _complete(config: PoolConfig, uri: str, own: Lease) -> None:
    started = time.time()
    table = _apply(config, config.model, uri, own) if config.model else _train(config, uri, own)
    own.require()
    storage.write_table(storage.join(uri, SLIDES), table)
    _draw(config, uri, table)
    own.require()
    run_directory.finish_run(config, uri, {"seconds": round(time.time() - started, 1)})


def _apply(config: PoolConfig, model_uri: str, uri: str, own: Lease) -> pa.Table:
    """The answers of a trained model."""
    content, card = model.read_model(model_uri)
    scored = bags.read_slides(config.scores)
    _require_encoder(config, card, scored)
    run_directory.claim_run(config, uri, own.require)
    cluster.connect()
    return answers.answer_table(scored, _answered(config, content, scored, own), card)


def _require_encoder(config: PoolConfig, card: model.PoolCard, scored: bags.ScoredSlides) -> None:
    """Raises BundleError for embeddings of another model than those it was trained on."""
    if (scored.model_id, scored.embedding) != (card.encoder, card.embedding):
        raise BundleError(
            f"{config.model} pools embeddings of the model {card.encoder} ({card.embedding:,} numbers), and "
            f"{config.scores} has those of {scored.model_id} ({scored.embedding:,}): score the archive with "
            "the first, or train on these scores"
        )


def _train(config: PoolConfig, uri: str, own: Lease) -> pa.Table:
    """Train, write the model and its metrics, and return the answers."""
    scored = bags.read_slides(config.scores)
    known = labels.split_slides(config, scored)
    _announce(known)
    cluster_ends = cluster.connect()
    run_directory.claim_run(config, uri, own.require)
    run_directory.write_split(uri, known.parts)
    found = _fitted(config, uri, scored.scores, known.parts, cluster_ends)
    logger.info(f"epoch {found.epoch} of {config.epochs} has the least loss on validation")
    answered = _answered(config, found.weights, scored, own)
    validation = part_of(known.parts, VALIDATION)
    logits = np.stack([answered[name] for name in validation[schema.IMAGE_ID].to_pylist()])
    chosen = export.decided(logits, validation, EQUAL, target_sensitivity=config.target_sensitivity)
    card = _card(config, scored, known, found, chosen)
    table = answers.answer_table(scored, answered, card, pa.concat_tables([known.others, known.parts]))
    measured = answers.measure_slides(table, card)
    own.require()
    model.write_model(found.weights, card, storage.join(uri, run_directory.MODEL))
    run_directory.write_json(uri, run_directory.HISTORY, found.history)
    run_directory.write_json(uri, METRICS, measured | {"warnings": known.warnings})
    for line in answers.summary_of(measured):
        logger.info(line)
    return table


def _announce(known: LabelledSlides) -> None:
    for text in known.warnings:
        logger.warning(text)
    for part in PARTS:
        rows = part_of(known.parts, part)
        of = {name: rows[schema.TUMOR_CLASS].to_pylist().count(name) for name in TUMOR_CLASSES}
        patients = counted(len(rows[schema.PATIENT].unique()), "patient")
        classes = ", ".join(f"{n:,} {name}" for name, n in of.items())
        logger.info(f"{part}: {counted(len(rows), 'slide')} of {patients} ({classes})")


def _fitted(config: PoolConfig, uri: str, scores: str, slides: pa.Table, cluster_ends: bool) -> Fitted:
    """Train on one CPU worker, which reads the bags itself: a bag is small, and so is the network."""
    # Not at the top: a job starts without torch.
    from bcd.training.task import ProcessGroup, Trainer

    trainer = Trainer(
        fit_bags,
        cluster_ends=cluster_ends,
        train_loop_config=PoolTask(config, scores, slides),
        torch_config=ProcessGroup(),
        scaling_config=ScalingConfig(num_workers=1),
        run_config=train.kept_in(uri, config.max_failures),
    )
    return train.fitted(trainer, uri).return_value


def fit_bags(task: PoolTask) -> Fitted | BcdError:
    """The training function of the worker. An error for the user is returned, because Ray Train would restart
    a worker that raises."""
    from bcd.training.pooling import attention

    logging.getLogger().setLevel(logging.WARNING)
    log.hand_on("pool")
    cluster.share_cores(1)
    config = task.config
    names = task.slides.filter(pc.not_equal(task.slides[schema.PART], split.TEST))[schema.IMAGE_ID]
    try:
        with tempfile.TemporaryDirectory() as folder:
            held = bags.load_bags(task.scores, names.to_pylist(), Path(folder))
            return attention.fit_network(held, task.slides, config.seed, config.epochs, config.learning_rate)
    except (DataError, DivergedError) as error:
        return error


def _answered(
    config: PoolConfig, content: bytes, scored: bags.ScoredSlides, own: Lease
) -> dict[str, np.ndarray]:
    """Logits of every slide with a tile, in a process that has torch, which writes the attention, too."""
    own.require()
    task = ray.remote(num_cpus=1, max_retries=-1)(answer_slides)
    uri = storage.join(config.output, config.name)
    return ray.get(task.remote(content, scored.scores, _with_tiles(scored.table), uri))


def _with_tiles(slides: pa.Table) -> list[str]:
    return slides.filter(pc.is_null(slides[schema.ERROR]))[schema.SLIDE].to_pylist()


def answer_slides(content: bytes, scores: str, slides: list[str], uri: str) -> dict[str, np.ndarray]:
    """Logits (classes,) by slide; writes the attention of their tiles."""
    from bcd.training.pooling import attention

    with tempfile.TemporaryDirectory() as folder:
        logits, table = attention.answer_bags(content, bags.load_bags(scores, slides, Path(folder)))
    storage.write_table(storage.join(uri, ATTENTION), table)
    return logits


def _draw(config: PoolConfig, uri: str, table: pa.Table) -> None:
    """Draw the attention of the most malignant slides."""
    answered = table.filter(pc.is_null(table[schema.ERROR]))
    order = pc.sort_indices(
        answered, [(schema.PROBABILITY_MALIGNANT, "descending"), (schema.SLIDE, "ascending")]
    )
    chosen = answered.take(order[: config.maps])[schema.SLIDE].to_pylist()
    task = ray.remote(num_cpus=1, max_retries=-1)(draw_slide_attention)
    ray.get([task.remote(storage.absolute(config.scores), name, uri) for name in chosen])


def draw_slide_attention(scores: str, slide: str, uri: str) -> None:
    """Draw the attention of one slide of a run."""
    # Not at the top: the job itself does without the libraries that draw.
    from bcd.training.pooling import maps

    found = storage.dataset(storage.join(uri, ATTENTION)).to_table(filter=pc.field(schema.SLIDE) == slide)
    maps.draw_attention(scores, slide, found, uri)


def _card(
    config: PoolConfig,
    scored: bags.ScoredSlides,
    known: LabelledSlides,
    found: Fitted,
    chosen: dict[str, Any],
) -> model.PoolCard:
    settings = config.model_dump(mode="json")
    return model.make_card(
        content=found.weights,
        encoder=scored.model_id,
        embedding=scored.embedding,
        classes=TUMOR_CLASSES,
        **chosen,
        epoch=found.epoch,
        slides={part: len(part_of(known.parts, part)) for part in PARTS},
        split_fingerprint=split.fingerprint(known.parts),
        training=settings | {name: without_folders(settings[name]) for name in PLACES},
        warnings=tuple(known.warnings),
        versions=provenance.versions(),
        git_commit=provenance.git_commit(),
    )
