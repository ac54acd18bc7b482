"""Ablation: a cross-validation for each arm, all on the same folds, and their paired differences."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from bcd import lease, storage
from bcd.config.options import OFF, Role
from bcd.config.training import RECIPES, AblateConfig, CrossvalConfig, TrainingConfig
from bcd.errors import ConfigError
from bcd.evaluation import artifacts
from bcd.metrics import compare
from bcd.runtime import output, prepare, run_directory
from bcd.text import counted, in_markdown
from bcd.training import crossval

logger = logging.getLogger(__name__)

PLAIN = "plain"
TABLE, NUMBERS = "ablation.md", "ablation.json"
# The metrics of the table; all others are in `NUMBERS`.
SHOWN = {"auc": "AUC", "balanced_accuracy": "balanced accuracy", "brier": "Brier score"}


def run(config: AblateConfig) -> str:
    """Cross-validate every arm, compare each with the first, and return the URI of the ablation.

    Running the same config again trains what is missing: each arm is a study, each fold a run.

    Raises:
        ConfigError: an arm is no recipe and no settings.
        BcdError: an error for the user, as of `crossval.run`.
    """
    uri = storage.join(config.output, config.name)
    arms = arms_of(config, uri)
    output.read_marker(uri, output.ABLATE)
    with lease.held(uri, config.wait) as own:
        output.claim_folder(uri, output.ABLATE, own.require)
        for number, (arm, study) in enumerate(arms.items(), 1):
            logger.info(f"\narm {number} of {len(arms)}: {arm}")
            crossval.run(study)
        own.require()
        compared = _compared({arm: storage.join(uri, study.name) for arm, study in arms.items()})
        run_directory.write_json(uri, NUMBERS, compared)
        text = table_of(compared)
        storage.write_bytes(storage.join(uri, TABLE), text.encode())
        logger.info(f"\n{text}")
    return uri


def arms_of(config: AblateConfig, uri: str) -> dict[str, CrossvalConfig]:
    """The study of each arm, the baseline first: they differ in the settings of the arm only."""
    own = set(AblateConfig.model_fields) - set(CrossvalConfig.model_fields)
    store = prepare.store_of(config)
    shared = config.model_dump(exclude=own) | {
        "output": uri,
        # Arms share them, as they change nothing about an image before the network's input.
        "prepared": OFF if store is None else store.uri,
    }
    return {
        arm: CrossvalConfig(**shared | _settings(arm) | {"name": re.sub(r"[^\w.]+", "-", arm).strip("-")})
        for arm in config.arms
    }


def _settings(arm: str) -> dict[str, Any]:
    """Settings by name of an arm: `plain`, a recipe, or NAME=VALUE,NAME=VALUE."""
    if arm == PLAIN:
        return {}
    for name, settings in RECIPES.items():
        if arm == name:
            return {**settings, "recipe": arm}
    parts = [pair.partition("=") for pair in arm.split(",")]
    pairs = {name.replace("-", "_"): value for name, _, value in parts}
    if unknown := pairs.keys() - TrainingConfig.names(Role.OPERATIONAL, Role.SHARED):
        known = ", ".join([PLAIN, *RECIPES])
        raise ConfigError(
            f"--arms {arm!r}: {min(unknown)!r} is no setting in which arms can differ; expected {known}, or "
            "settings such as ema_decay=0.99,mixup=0.2"
        )
    return pairs


def _compared(studies: Mapping[str, str]) -> dict[str, Any]:
    """`compare.paired` of every arm with the first."""
    tables = {
        arm: storage.read_table(storage.join(uri, artifacts.IMAGES)).to_pandas()
        for arm, uri in studies.items()
    }
    baseline, *others = tables
    return {
        "baseline": baseline,
        "arms": {arm: compare.paired(tables[arm], tables[baseline]) for arm in others},
    }


def table_of(compared: Mapping[str, Any]) -> str:
    """The comparison as a page in Markdown."""
    arms = compared["arms"]
    first = next(iter(arms.values()))
    n_patients = first["n_patients"]
    of = f" of {counted(n_patients, 'patient')}" if n_patients else ""
    lines = [
        f"# Ablation against {in_markdown(compared['baseline'])}",
        "",
        f"{counted(first['n_images'], 'image')}{of}, the same folds for all arms. Differences are arm minus "
        "baseline, with 95 % intervals over patients, paired. An interval that contains 0 shows no "
        f"difference. Of {counted(len(arms) * len(SHOWN), 'interval')} one in twenty excludes 0 by chance.",
        "",
        "| arm | " + " | ".join(f"{name} | difference" for name in SHOWN.values()) + " |",
        "|---" * (1 + 2 * len(SHOWN)) + "|",
        "| " + " | ".join([in_markdown(compared["baseline"]), *_baseline(first)]) + " |",
    ]
    lines += [
        "| " + " | ".join([in_markdown(arm), *_row(found["metrics"])]) + " |" for arm, found in arms.items()
    ]
    return "\n".join(lines) + "\n"


def _baseline(found: Mapping[str, Any]) -> list[str]:
    return [text for name in SHOWN for text in (_number(found["metrics"][name]["second"]), "")]


def _row(metrics: Mapping[str, Any]) -> list[str]:
    return [text for name in SHOWN for text in (_number(metrics[name]["first"]), _difference(metrics[name]))]


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"


def _difference(found: Mapping[str, Any]) -> str:
    if found["difference"] is None:
        return "not defined"
    if found["interval"] is None:
        return f"{found['difference']:+.3f} (too few patients for an interval)"
    low, high = found["interval"]
    return f"{found['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
