"""Settings of an evaluation, and of what a person should look at after it."""

from pydantic import Field, model_validator

from bcd.config.options import AUTO, DryConfig, Engine, LabelledConfig, Operational, OutputConfig, Precision
from bcd.config.signing import SignedConfig


class EvaluateConfig(LabelledConfig, SignedConfig, DryConfig):
    """Evaluate a model on its held-out test part, or on data that it has never seen."""

    model: str
    """The model bundle: a local folder, s3://, gs:// or hf://OWNER/NAME[@REVISION]."""

    data: str
    """The data set that the model was trained on, whose split is read from the model card; or another one,
    which is scored whole if the run's split.parquet proves that none of its images, no near duplicate of one
    and none of its patients was trained on."""

    output: Operational[str | None] = None
    """Folder for predictions, metrics and report; by default beside the bundle, in its run."""

    force: bool = False
    """Score data that the model may have been trained on, and mark every number."""

    prepared: Operational[str] = AUTO
    """Folder of decoded and fitted images, see jobs/train.py. auto: beside the run of the model, if it is
    there. off: all files are decoded."""

    against: Operational[str | None] = None
    """Output of another evaluation of the same images: the two models are compared on the same patients."""

    batch_size: int = Field(default=32, ge=1)
    """Images per forward pass."""

    precision: Precision = "float32"
    """float32 gives the same numbers everywhere; bfloat16 is faster."""

    engine: Engine = "auto"
    """What computes the network, as in jobs/score.py; each row of the predictions names it."""

    @model_validator(mode="after")
    def _marked_numbers_stay_apart(self) -> "EvaluateConfig":
        if self.force and self.output is None:
            raise ValueError(
                "--force needs --output: its numbers must not replace those of the held-out part"
            )
        return self


class TriageConfig(OutputConfig):
    """Write wrong and least certain predictions for a person to look at, and read the labels back."""

    scores: str
    """Output of jobs/score.py, jobs/evaluate.py or jobs/train.py."""

    output: Operational[str] = "triage"
    """Folder for triage.csv, fiftyone/ and manifest.parquet: local, s3:// or gs://."""

    most: int = Field(default=200, ge=1)
    """Most rows of triage.csv that are wrong, and most that are uncertain."""

    labels: str | None = None
    """triage.csv with labels in its column reviewed_class (benign, malignant, a subtype, or exclude), also
    saved by a spreadsheet: writes manifest.parquet in place of a sheet, to train on."""
