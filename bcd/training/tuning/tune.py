"""The job: trainings with different settings, judged on validation patients, and one more with the best."""

import importlib
import logging
import math
import os
import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from ray import tune
from ray.train import UserCallback
from ray.tune import Callback, ResultGrid
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.result import EXPERIMENT_TAG, TRIAL_ID

from bcd import lease, provenance, schema, storage
from bcd.config import log
from bcd.config.training import TrainConfig, TuneConfig
from bcd.errors import BcdError, ConfigError, DivergedError
from bcd.metrics import decision, measures
from bcd.runtime import cluster, prepare, run_directory
from bcd.runtime.prepare import DatasetFacts
from bcd.runtime.run_directory import SELECTION
from bcd.taxonomy import VALIDATION
from bcd.text import counted, without_folders
from bcd.training import feed, train
from bcd.training.feed import Held
from bcd.training.tuning import trials as found
from bcd.training.tuning.space import Values, read_space, training_of
from bcd.training.tuning.trials import Trial

logger = logging.getLogger(__name__)

SPACE, TRIALS, PAGE, BEST = "space.json", "trials.json", "tuning.html", "best"
# Folders of Ray Tune's own state, and of the trainings, which are deleted when the search has ended.
SEARCH, RUNS = "search", "trials"
# Of each trial, before others may end it, as a share of the epochs.
GRACE = 0.25
FAILURE = "failure"
# Ray Tune prints no tables, and SIGINT ends the job like any other.
OWN_LINES = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_SIGINT_HANDLER": "1"}


def run(config: TuneConfig) -> str:
    """Search, train with the best settings, and return the URI of the search; that run is in `best/`.

    Running the same config again resumes the search, or what comes after it.

    Raises:
        BcdError: an error for the user, before any long work where possible.
    """
    config = train.resolved(config)
    space = read_space(config)
    _require_optuna(config)
    uri = storage.join(config.output, config.name)
    if run_directory.begin_run(config, uri):
        logger.info(f"{uri} is finished: see {PAGE} and {BEST}/report.html there, or choose another --name")
        return uri
    started = time.time()
    with lease.held(uri, config.wait) as own:
        cluster.connect(several_trainings=True)
        inspected = prepare.load_data_set(config)
        table, facts = train.split_of(config, uri, inspected, own)
        _keep_space(uri, space)
        placed = prepare.located(table, prepare.store_of(config))
        held = feed.hold(config, placed)
        if not storage.exists(storage.join(uri, TRIALS)):
            judged = _judged_on(table)
            results = _search(config, space, uri, placed, held)
            own.require()
            _write(config, uri, _trials(results, space, uri), judged | {"synthetic": facts.synthetic})
        own.require()
        # The checkpoints of trials are many times as large as all else.
        storage.delete_folder(storage.join(uri, RUNS))
        _train_best(config, uri, inspected, held)
        run_directory.finish_run(config, uri, {"seconds": round(time.time() - started, 1)})
    return uri


def _require_optuna(config: TuneConfig) -> None:
    if config.search == "optuna":
        try:
            importlib.import_module("optuna")
        except ImportError:
            raise ConfigError(
                "--search optuna requires a package that is not installed; run: pip install optuna"
            ) from None


def _keep_space(uri: str, space: Mapping[str, Values]) -> None:
    """Write the space, or check that it is that of the search; raises ConfigError."""
    now = {name: values.model_dump(mode="json", exclude_none=True) for name, values in space.items()}
    if not storage.exists(storage.join(uri, SPACE)):
        run_directory.write_json(uri, SPACE, now)
    elif (before := run_directory.read_json(uri, SPACE)) != now:
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        raise ConfigError(
            f"--space has changed since {uri} began: {', '.join(changed)}. Restore it to resume, or choose "
            "another --name"
        )


def _judged_on(table: pa.Table) -> dict[str, Any]:
    """The validation part, of which a few patients choose by chance."""
    rows = prepare.part_of(table, VALIDATION)
    frame = rows.select([schema.TUMOR_CLASS, schema.PATIENT]).to_pandas()
    choosable = decision.is_choosable(measures.patients_by_class(frame))
    n_patients = None if frame[schema.PATIENT].isna().any() else frame[schema.PATIENT].nunique()
    if not choosable:
        logger.warning(
            f"{counted(len(rows), 'validation image')} of {counted(n_patients or 0, 'patient')}: too few "
            "patients to compare trials; see --validation-fraction"
        )
    return {"n_images": len(rows), "n_patients": n_patients, "is_choosable": choosable}


def _search(
    config: TuneConfig, space: Mapping[str, Values], uri: str, table: pa.Table, held: Held | None
) -> ResultGrid:
    """All trials to their ends, from where an earlier job was."""
    at_once = config.parallel or cluster.room(config)
    logger.info(f"{counted(config.trials, 'trial')}, {at_once} at a time")
    filesystem, path = storage.resolve(uri)
    given = {"settings": config, "uri": uri, "table": table, "held": held}
    trial = tune.with_parameters(_trial, **given, runs_per_node=cluster.per_node(at_once))
    # It drives the workers of its training, which request the CPUs; and a request has to be of something.
    trial = tune.with_resources(trial, {"CPU": 0, "memory": 1})
    place = f"{path}/{SEARCH}"
    if tune.Tuner.can_restore(place, storage_filesystem=filesystem):
        tuner = tune.Tuner.restore(place, trial, resume_errored=True, storage_filesystem=filesystem)
    else:
        tuner = tune.Tuner(
            trial,
            param_space={name: _domain(values) for name, values in space.items()},
            tune_config=tune.TuneConfig(
                metric=SELECTION, mode="max", num_samples=config.trials, **_chosen_by(config, at_once)
            ),
            run_config=tune.RunConfig(
                name=SEARCH,
                storage_path=path,
                storage_filesystem=filesystem,
                verbose=0,
                callbacks=[TrialLines(config.trials)],
            ),
        )
    os.environ.update(OWN_LINES)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # an error of a trial is raised below
    results = tuner.fit()
    if not results.errors and results.num_terminated < config.trials:
        raise BcdError(
            f"{results.num_terminated} of {config.trials} trials have ended; run the same command again to "
            "resume"
        )
    return results


def _domain(values: Values) -> Any:
    """The distribution of Ray Tune."""
    if values.choice:
        return tune.choice(list(values.choice))
    if values.integer:
        low, high = values.integer
        return tune.randint(low, high + 1)
    return tune.loguniform(*values.loguniform) if values.loguniform else tune.uniform(*values.ends())


def _chosen_by(config: TuneConfig, at_once: int) -> dict[str, Any]:
    """What chooses the settings of trials, and what ends them."""
    own: dict[str, Any] = {"scheduler": _scheduler(config)}
    if config.search == "random":
        order = tune.search.BasicVariantGenerator(max_concurrent=at_once, random_state=config.seed)
        return own | {"search_alg": order}
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return own | {"search_alg": OptunaSearch(seed=config.seed), "max_concurrent_trials": at_once}


def _scheduler(config: TuneConfig) -> Any:
    if config.scheduler == "none":
        return None
    # One more than there are: a trial ends its last epoch by itself.
    return tune.schedulers.ASHAScheduler(
        time_attr=schema.EPOCH,
        max_t=config.epochs + 1,
        grace_period=max(1, math.ceil(GRACE * config.epochs)),
        reduction_factor=3,
    )


class TrialLines(Callback):
    """A line for each trial that has ended."""

    def __init__(self, n_trials: int) -> None:
        self._n_trials = n_trials

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        order = sorted(trials, key=lambda one: _began(one.experiment_tag))
        n_ended = sum(one is trial or one.status == trial.TERMINATED for one in trials)
        result = trial.last_result or {}
        reached = result.get(run_directory.SCORE)
        said = result.get(FAILURE) or f"balanced accuracy {reached:.3f} after epoch {result[schema.EPOCH]}"
        name = f"trial {order.index(trial) + 1} ({n_ended} of {self._n_trials})"
        logger.info(f"{name}: {said}; {found.chosen_flags(trial.config)}")


def _began(tag: str) -> int:
    """For the order in which trials began: Ray Tune gives those of a resumed search in another."""
    return int(tag.partition("_")[0])


def _trial(
    chosen: dict[str, Any],
    settings: TuneConfig,
    uri: str,
    table: pa.Table,
    held: Held | None,
    runs_per_node: int,
) -> None:
    """One training, in a process of Ray Tune. Where the settings are impossible or the loss diverges, that is
    its result; any other error is the search's."""
    log.hand_on("tune")
    name = _run_name(tune.get_context().get_trial_id())
    try:
        config = training_of(settings, chosen, output=storage.join(uri, RUNS), name=name)
        history = _fit(config, table, held, runs_per_node, TuneReportCallback())
        # Again, because a resumed one may have had no epoch left, and every trial needs a result.
        tune.report({recorded: history[-1][recorded] for recorded in found.RECORDED})
    except (DivergedError, ConfigError) as error:
        tune.report({FAILURE: str(error), SELECTION: -math.inf, schema.EPOCH: 0})


def _fit(
    config: TrainConfig, table: pa.Table, held: Held | None, runs_per_node: int, report: UserCallback
) -> list[dict[str, Any]]:
    run_uri = storage.join(config.output, config.name)
    stain = feed.stain_of(config, run_uri, table)
    fed = feed.feed_of(config, table, held, stain)
    weights, scaling = train.initial_weights(config), cluster.scaling(config)
    result = train.train_model(config, run_uri, fed, weights, scaling, runs_per_node, callbacks=(report,))
    return result.return_value


def _run_name(trial_id: str) -> str:
    return f"trial-{trial_id}"


def _trials(results: ResultGrid, space: Mapping[str, Values], uri: str) -> list[Trial]:
    """The trials of a search that has ended; raises BcdError where one of them lacks a result.

    Their epochs are those of their runs: Ray Tune has lost some where the search was killed.
    """
    for error in results.errors:
        cause = getattr(error, "cause", error)
        raise cause if isinstance(cause, BcdError) else error
    trials = []
    for number, result in enumerate(sorted(results, key=lambda one: _began(one.metrics[EXPERIMENT_TAG])), 1):
        facts = result.metrics
        failure = facts.get(FAILURE)
        records: list[dict[str, float]] = []
        if failure is None:
            run_uri = storage.join(uri, RUNS, _run_name(facts[TRIAL_ID]))
            history = run_directory.read_json(run_uri, run_directory.HISTORY)
            records = [{name: record[name] for name in found.RECORDED} for record in history]
        settings = {name: facts["config"][name] for name in space}
        trials.append(Trial(number=number, settings=settings, epochs=records, failure=failure))
    return trials


def _write(config: TuneConfig, uri: str, trials: list[Trial], judged: Mapping[str, Any]) -> None:
    """The table and the page; raises ConfigError where no trial has a model."""
    if not any(trial.epochs for trial in trials):
        raise ConfigError(f"no trial could be trained; the first: {trials[0].failure}")
    facts = {
        **judged,
        "title": f"Search: {config.name}",
        "n_epochs": config.epochs,
        "command": without_folders(provenance.command()),
    }
    storage.write_bytes(storage.join(uri, PAGE), found.render_search(trials, facts).encode())
    run_directory.write_json(uri, TRIALS, [trial.model_dump(mode="json") for trial in trials])


def _train_best(
    config: TuneConfig, uri: str, inspected: tuple[pa.Table, DatasetFacts], held: Held | None
) -> None:
    """An ordinary run with the best settings: bundle, test part, report."""
    trials = [Trial(**record) for record in run_directory.read_json(uri, TRIALS)]
    best = found.ranked(trials)[0]
    logger.info(f"\nbest: trial {best.number}: {found.chosen_flags(best.settings)}")
    train.run(training_of(config, best.settings, output=uri, name=BEST), inspected, held=held)
    logger.info(f"all trials: {storage.join(uri, PAGE)}")
