"""The demo: all jobs on synthetic images, small enough for two cores."""

import logging
import sys
from pathlib import Path

from bcd import storage
from bcd.config.scoring import ScoreConfig
from bcd.config.training import DemoConfig, TrainConfig
from bcd.data import synthetic
from bcd.runtime import output, run_directory
from bcd.scoring import score
from bcd.training import train

logger = logging.getLogger(__name__)


def run(config: DemoConfig) -> str:
    """Generate images, train on them, evaluate, score an archive; returns the URI of the run."""
    folder = Path(config.output)
    output.claim_folder(str(folder), output.DEMO)
    plan = synthetic.PatientPlan(patients_per_subtype=config.patients_per_subtype, seed=config.seed)
    paths = synthetic.write_tree(folder, plan)
    logger.info(
        f"wrote {len(paths):,} synthetic images to {folder}; results on them say nothing about tissue"
    )
    training = TrainConfig(
        data=str(folder / "BreaKHis_v1"),
        output=str(folder),
        name="run",
        weights="none",
        epochs=config.epochs,
        batch_size=16,
        learning_rate=3e-4,
        input_height_px=96,
        input_width_px=144,
        seed=config.seed,
    )
    run_uri = train.run(training)
    archive = _archive(folder / "archive", config.seed + 1)
    model_uri = storage.join(run_uri, run_directory.MODEL)
    score.run(ScoreConfig(model=model_uri, input=archive, output=str(folder / "scores")))
    logger.info(f"to use the model in a browser: {sys.executable} jobs/serve.py --model {model_uri}")
    return run_uri


def _archive(folder: Path, seed: int) -> str:
    """Write images of other patients than those of the training, and one truncated file."""
    plan = synthetic.PatientPlan(patients_per_subtype=1, images_per_magnification=1, seed=seed)
    paths = synthetic.write_tree(folder, plan)
    (folder / "cut short.png").write_bytes(paths[0].read_bytes()[:20_000])
    logger.info(f"wrote an archive of {len(paths) + 1} files to {folder}, one of them truncated")
    return str(folder)
