"""What a cross-validation would do."""

from bcd import storage
from bcd.config.training import CrossvalConfig
from bcd.evaluation import artifacts
from bcd.preflight.dry_run import page, train
from bcd.runtime import prepare, run_directory
from bcd.taxonomy import PARTS
from bcd.text import counted
from bcd.training import crossval, export
from bcd.training.crossval import Fold


def run(config: CrossvalConfig) -> list[str]:
    """Log the lines of a dry run, and return them; raises BcdError as the job would before its work."""
    return page.show(study_lines(config))


def study_lines(config: CrossvalConfig) -> list[str]:
    """The lines of one study."""
    config = train.resolved_here(config)
    uri = storage.join(config.output, config.name)
    if config.against:
        artifacts.require_images(config.against)
    run_directory.begin_run(config, uri)
    folds = [fold for name in config.protocols() for fold in crossval.folds_of(config, uri, name)]
    todo = [fold for fold in folds if not _is_finished(fold)]
    done = f"{len(folds) - len(todo)} of {counted(len(folds), 'run')} are finished in {uri}"
    if not todo:
        return [done]
    rows, facts = train.data_set(config)
    lines, splits = [*train.data_lines(config, rows, facts), done], []
    lines += [f"warning: {text}" for text in facts.warnings]
    for fold in todo:
        parts, found = prepare.prepare(fold.config, (rows, facts))
        splits.append(parts)
        counts = [len(prepare.part_of(parts, part)) for part in PARTS]
        shown = ", ".join(f"{part} {n:,}" for part, n in zip(PARTS, counts, strict=True))
        lines.append(f"{crossval.name_of(fold)}: {shown}")
        lines += [f"  warning: {text}" for text in found.warnings if text not in facts.warnings]
    return [*lines, train.network_line(config), *train.estimated_lines(config, splits)]


def _is_finished(fold: Fold) -> bool:
    return run_directory.begin_run(fold.config, fold.uri) and export.fault(fold.uri) is None
