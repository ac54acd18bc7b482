"""What an ablation would do."""

from bcd import storage
from bcd.config.training import AblateConfig
from bcd.preflight.dry_run import crossval, page
from bcd.runtime import output
from bcd.training.ablation import ablate


def run(config: AblateConfig) -> list[str]:
    """Log the lines of a dry run, arm by arm, and return them; raises BcdError as the job would before its
    work."""
    uri = storage.join(config.output, config.name)
    output.read_marker(uri, output.ABLATE)
    arms = ablate.arms_of(config, uri)
    return page.show(
        [
            line
            for number, (arm, study) in enumerate(arms.items(), 1)
            for line in (f"arm {number} of {len(arms)}: {arm}", *crossval.study_lines(study))
        ]
    )
