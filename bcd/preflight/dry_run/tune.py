"""What a search would do."""

from bcd import storage
from bcd.config.training import TuneConfig
from bcd.preflight.dry_run import page, train
from bcd.runtime import prepare, run_directory
from bcd.text import counted
from bcd.training.tuning.space import read_space


def run(config: TuneConfig) -> list[str]:
    """Log the lines of a dry run, and return them; raises BcdError as the search would before its work."""
    config = train.resolved_here(config)
    space = read_space(config)
    uri = storage.join(config.output, config.name)
    if run_directory.begin_run(config, uri):
        return page.show([f"{uri} is finished: nothing is left to do"])
    rows, facts = train.data_set(config)
    parts, known = prepare.prepare(config, (rows, facts))
    return page.show(
        [
            *train.data_lines(config, rows, facts),
            *(f"warning: {text}" for text in known.warnings),
            *prepare.describe_split(config, parts, known.model_copy(update={"quarantined": []})),
            train.network_line(config),
            f"{counted(config.trials, 'trial')} with other {', '.join(space)}, and a training with the best",
            *train.estimated_lines(config, [parts] * (config.trials + 1)),
        ]
    )
