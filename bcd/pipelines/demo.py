"""The whole way on made-up pictures, small enough for two cores."""

from pathlib import Path

from bcd import synthetic
from bcd.config import DemoConfig, TrainConfig
from bcd.pipelines import train


def run(config: DemoConfig) -> str:
    """Generate pictures, train on them, evaluate, and return the URI of the run."""
    folder = Path(config.output)
    plan = synthetic.Plan(patients_per_subtype=config.patients_per_subtype, seed=config.seed)
    paths = synthetic.write_tree(folder, plan)
    print(
        f"made {len(paths):,} synthetic pictures in {folder}; their numbers say nothing about tissue",
        flush=True,
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
    return train.run(training)
