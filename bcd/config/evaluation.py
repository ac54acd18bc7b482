"""The settings of an evaluation."""

from pydantic import Field, model_validator

from bcd.config.options import LabelledConfig, Precision


class EvaluateConfig(LabelledConfig):
    """Score a model's held-out test part, or data that it has never seen, and say how good it is."""

    model: str
    """The model bundle: a local folder, s3:// or gs://."""

    data: str
    """The data set that the model was trained on, whose split is read from the model card, or another one,
    which is scored whole where the run's split.parquet proves that none of its pictures was trained on, no
    near copy of one, and none of its patients."""

    output: str | None = None
    """Where predictions, metrics and report go; by default beside the bundle, in its run."""

    force: bool = False
    """Score data that the model may have been trained on: every number is marked."""

    against: str | None = None
    """Output of another evaluation of the same images: the two models are compared on the same patients."""

    batch_size: int = Field(default=32, ge=1)
    """Images per forward pass."""

    precision: Precision = "float32"
    """float32 gives the same numbers everywhere; bfloat16 is faster."""

    @model_validator(mode="after")
    def _marked_numbers_stay_apart(self) -> "EvaluateConfig":
        if self.force and self.output is None:
            raise ValueError(
                "--force needs --output: its numbers must not replace those of the held-out part"
            )
        return self
