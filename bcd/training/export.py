"""From the best epoch, or all models of a study, to a bundle: novelty statistics, temperature, threshold.

The bundle of a training is made without its test part. That of a study has seen all images; what its card
says of others comes from the models of the study, each on the images that it had not seen (out of fold).
"""

import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from ray.train import Result

from bcd import provenance, schema, storage, taxonomy, text
from bcd.config.options import CLOSED_FORM, HUB_WEIGHTS, TIMM
from bcd.config.training import TrainConfig, TrainingConfig
from bcd.errors import BundleError, ConfigError
from bcd.imaging.image import IMAGENET_MEAN, IMAGENET_STD
from bcd.metrics import aggregate, calibration, decision, measures
from bcd.model import bundle, card
from bcd.model.card import Card, Study
from bcd.model.novelty import FeatureStatistics
from bcd.model.recipes.reference import Macenko, Reinhard
from bcd.reports import model_report
from bcd.runtime import feature_statistics, run_directory
from bcd.runtime.prepare import DatasetFacts, part_of
from bcd.runtime.run_directory import SCORE, SELECTION
from bcd.split import balance, split

if TYPE_CHECKING:
    from bcd.model.resnet import Network

logger = logging.getLogger(__name__)

# Settings of the training that no other job reads from the card: others see no folders of this machine.
PLACES = ("data", "output", "prepared")
# Of the record of an epoch, what the card keeps.
VALIDATION = (schema.EPOCH, SCORE, "n_validation")
# Of the metrics of a study, what its report needs and its bundle does not.
LEFT_OUT = ("folds", "leak", "out_of_fold", "comparison")


def bundle_of(
    config: TrainConfig,
    uri: str,
    table: pa.Table,
    facts: DatasetFacts,
    result: Result,
    stain: Macenko | Reinhard | None = None,
) -> None:
    """Write the best epoch as a bundle to `uri`, with the stain that its images were normalised to; raises
    BundleError if no checkpoint is intact."""
    from bcd.model import predictor  # not at the top: a job starts without torch

    network, measured = _best(result, config)
    train, validation = part_of(table, split.TRAIN), part_of(table, split.VALIDATION)
    known = _card(config, train, facts, measured).model_copy(update={"stain": stain})
    features, logit = feature_statistics.compute_statistics(network, known, train, validation)
    prior = prior_of(config, train)
    chosen = decided(logit, validation, prior, config.target, config.target_sensitivity)
    predictor.save(network, known.model_copy(update=chosen | {"feature_statistics": features}), uri)


def require_valid_card(config: TrainConfig, table: pa.Table, facts: DatasetFacts) -> None:
    """Raises BundleError before the training if no valid card could be written after it."""
    measured = {schema.EPOCH: 1, SCORE: 0.5, "n_validation": 1}
    card.dump(_card(config, part_of(table, split.TRAIN), facts, measured))


def fault(run_uri: str) -> str | None:
    """Why the bundle of a finished run is not usable; None if it is."""
    try:
        bundle.identify(storage.join(run_uri, run_directory.MODEL))
    except BundleError as error:
        return str(error)
    return None


def _best(result: Result, config: TrainConfig) -> tuple["Network", dict[str, Any]]:
    """The network of the best epoch with an intact checkpoint, and its metrics."""
    from bcd.model import weights
    from bcd.training import checkpoint

    n_classes, size = len(taxonomy.classes(config.target)), config.input_size_px
    best_first = sorted(result.best_checkpoints, key=lambda pair: pair[1][SELECTION], reverse=True)
    for kept, measured in best_first:
        try:
            with kept.as_directory() as folder:
                tensors, _ = checkpoint.read_checkpoint(Path(folder))
                return weights.assembled(n_classes, tensors, config.architecture, size), measured
        except BundleError as error:
            epoch = measured[schema.EPOCH]
            logger.warning(f"the checkpoint of epoch {epoch} is damaged: {error}")
    raise BundleError("no checkpoint of this run is intact; choose another --name to train again")


def _card(config: TrainConfig, train: pa.Table, facts: DatasetFacts, measured: dict[str, Any]) -> Card:
    license = None
    if config.architecture.startswith(TIMM) or config.weights.startswith(HUB_WEIGHTS):
        from bcd.model.networks import timm_weights  # not at the top: it imports torch

        license = timm_weights.license_of(config.architecture, config.weights)
    settings = config.model_dump(mode="json")
    shared = config.model_dump(
        include={"architecture", "target", "input_height_px", "input_width_px", "protocol", "fold", "seed"}
        | {"symmetries"}
    ) | facts.model_dump(
        include={"data_fingerprint", "split_fingerprint", "synthetic", "field_height_px", "field_width_px"}
    )
    return card.make(
        **shared,
        mean=config.mean or IMAGENET_MEAN,
        std=config.std or IMAGENET_STD,
        weights_license=license,
        classes=taxonomy.classes(config.target),
        mpp=_distinct(train, schema.MPP),
        magnifications=_distinct(train, schema.MAGNIFICATION),
        leaky=config.protocol in split.LEAKY,
        warnings=tuple(facts.warnings),
        training=settings | {name: text.without_folders(settings[name]) for name in PLACES},
        validation={name: measured[name] for name in VALIDATION if name in measured},
        versions=provenance.versions(),
        git_commit=provenance.git_commit(),
    )


def _distinct(table: pa.Table, column: str) -> tuple[Any, ...]:
    return tuple(sorted({round(v, 4) for v in table[column].to_pylist() if v is not None}))


def prior_of(config: TrainingConfig, train: pa.Table) -> float:
    """Share of malignant rows in an epoch."""
    rows = balance.counts(balance.upsample(train, config.balance, config.seed), "tumor_class")
    return rows[taxonomy.MALIGNANT] / sum(rows.values())


def decided(
    logit: np.ndarray,
    validation: pa.Table,
    prior: float,
    predicted: taxonomy.Target = "tumor_class",
    target_sensitivity: float | None = None,
    chosen_on: str = "validation",
) -> dict[str, Any]:
    """Temperature and threshold for a card, from the logits (n, classes) of the validation rows.

    With few patients (see `decision.is_choosable`) the temperature is 1, and the threshold the share of
    malignant rows in training (`prior`). `chosen_on` names the rows.
    """
    by_class = measures.patients_by_class(validation.select([schema.TUMOR_CLASS, schema.PATIENT]).to_pandas())
    few = not decision.is_choosable(by_class)
    classes = taxonomy.classes(predicted)
    target = np.array([classes.index(name) for name in validation[predicted].to_pylist()])
    malignant = np.array(validation[schema.TUMOR_CLASS].to_pylist()) == taxonomy.MALIGNANT
    temperature = 1.0 if few else calibration.fit_temperature(logit, target)
    errors: dict[str, float | None] = {}
    for when, divisor in (("before", 1.0), ("after", temperature)):
        probability = calibration.probability_malignant(logit, classes, divisor)
        log_odds = aggregate.clipped_log_odds(probability)
        errors |= {
            f"cross_entropy_{when}": calibration.cross_entropy(malignant, log_odds),
            f"brier_{when}": calibration.brier(malignant, probability),
            f"ece_{when}": calibration.expected_error(malignant, probability),
        }
    chosen = decision.choose_threshold(malignant, probability, target_sensitivity, prior if few else None)
    patients = validation[schema.PATIENT]
    chosen |= {"n_patients": None if patients.null_count else len(patients.unique()), "chosen_on": chosen_on}
    if few:
        has = text.listed([text.counted(n, f"{name} patient") for name, n in (by_class or {}).items()])
        logger.warning(
            f"{chosen_on} has {has}, and choosing requires {decision.MIN_CHOOSING} of each class: "
            f"the temperature is 1, the threshold {chosen['threshold']:.3g} (rule: {chosen['rule']})"
        )
    return {
        "temperature": temperature,
        "calibration": errors,
        "threshold": chosen["threshold"],
        "operating_point": chosen,
    }


def median_epoch(cards: Iterable[Card]) -> int:
    """Number of epochs after which the models of a study were best: the median, of two the lower."""
    return statistics.median_low(int(one.validation[schema.EPOCH]) for one in cards)


def card_of_study(
    study: Study, config: TrainConfig, rows: pa.Table, facts: DatasetFacts, measured: Mapping[str, Any]
) -> Card:
    """The card of a study's bundle, without what depends on its weights.

    Args:
        study: what the bundle is.
        config: of a training on all images, for as many epochs as were best.
        rows: all images.
        facts: about them.
        measured: metrics of the study, with what `decided` chose as `out_of_fold`.
    """
    sentences = {
        "summary": model_report.summary(measured),
        "too_few_patients": model_report.too_few_patients(measured),
    }
    known = _card(config, rows, facts, {schema.EPOCH: config.epochs})
    metrics = {name: value for name, value in measured.items() if name not in LEFT_OUT} | sentences
    return known.model_copy(
        update={"study": study, "metrics": metrics, "fold": None} | measured["out_of_fold"]
    )


def ensemble_of(bundles: Mapping[str, Card], known: Card, judged: Mapping[str, Any] | None, uri: str) -> None:
    """Write the bundles of a study, by their URIs, as one.

    Args:
        bundles: their cards.
        known: from `card_of_study`.
        judged: `cutoff`, `n_training` and `n_validation` of novelty, if known.
        uri: of the new bundle.
    """
    from bcd.model import predictor, weights
    from bcd.model.networks.ensemble import Ensemble

    if any(one.evidence != CLOSED_FORM for one in bundles.values()):
        raise ConfigError(
            f"--export ensemble averages maps in closed form, and {known.architecture} has none: use refit"
        )
    members = []
    for member_uri, one in bundles.items():
        state = weights.read_weights(bundle.read_weights_of(member_uri, one), bundle.WEIGHTS)
        size = one.input_size_px
        members.append(weights.assembled(len(one.classes), state, one.architecture, size))
    features = joined_statistics([one.feature_statistics for one in bundles.values()], judged)
    predictor.save(Ensemble(members), known.model_copy(update={"feature_statistics": features}), uri)


def joined_statistics(
    parts: Sequence[FeatureStatistics | None], judged: Mapping[str, Any] | None
) -> FeatureStatistics | None:
    """Statistics of the features of several networks, one after another: novelty is then the root mean square
    of that of each. None where one of them has none."""
    known = [part for part in parts if part]
    if judged is None or len(known) < len(parts):
        return None
    mean, spread = (tuple(v for part in known for v in getattr(part, name)) for name in ("mean", "spread"))
    # The stain is of the images alone: that of one network's is a fair part of the study's.
    return FeatureStatistics(mean=mean, spread=spread, stain=known[0].stain, **judged)


def refit_of(
    config: TrainConfig,
    known: Card,
    judged: Mapping[str, Any] | None,
    uri: str,
    rows: pa.Table,
    result: Result,
) -> None:
    """Write the last epoch of a training on all rows as a bundle; see `ensemble_of`."""
    from bcd.model import predictor

    network, _ = _best(result, config)
    # It has seen every row: the cut-off, here of the first alone, is replaced.
    features, _ = feature_statistics.compute_statistics(network, known, rows, rows.slice(0, 1))
    statistics_of_study = features.model_copy(update=judged) if judged else None
    predictor.save(network, known.model_copy(update={"feature_statistics": statistics_of_study}), uri)
