"""What the service measures for Prometheus: each metric once, with its labels. No Ray and no torch here.

Labels are names of routes, statuses, codes, classes and models, of which there are few: never anything of an
image, a patient or a caller. `meter` hands them to Ray, which exports them with the prefix `ray_` at the
metrics port of each node.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

# Between 10 ms and the longest answer time by default.
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SHARES = tuple(n / 20 for n in range(1, 21))
RATIOS = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


@dataclass(frozen=True)
class Signal:
    """A metric: a counter, a gauge, or a histogram with the upper bounds of its buckets."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """The name of the series in Prometheus. Of a histogram the buckets: they and the count are exact, but
        Ray 2.60 makes the sum of the middles of the buckets."""
        return f"ray_{self.name}{ {'counter': '_total', 'gauge': '', 'histogram': '_bucket'}[self.kind] }"


REQUESTS = Signal(
    "bcd_requests",
    "counter",
    "Requests by route, status (or left: the caller did not wait) and code of the error (or none).",
    ("route", "status", "code"),
)
REQUEST_SECONDS = Signal(
    "bcd_request_seconds", "histogram", "Seconds from a request to its whole answer.", ("route",), SECONDS
)
PREDICTIONS = Signal(
    "bcd_predictions", "counter", "Images with an answer, by class.", ("model", "predicted_class")
)
PROBABILITY = Signal(
    "bcd_probability_malignant", "histogram", "Probability of malignancy of images.", ("model",), SHARES
)
NOVELTY = Signal(
    "bcd_novelty_ratio", "histogram", "Novelty of images over the model's cut-off.", ("model",), RATIOS
)
WARNINGS = Signal("bcd_warnings", "counter", "Warnings in answers, by code.", ("model", "code"))
IMAGE_ERRORS = Signal(
    "bcd_image_errors", "counter", "Images that cannot be used, by code.", ("model", "code")
)
BATCH_IMAGES = Signal("bcd_batch_images", "histogram", "Images in a forward pass.", ("model",), SIZES)
BATCH_SECONDS = Signal("bcd_batch_seconds", "histogram", "Seconds of a forward pass.", ("model",), SECONDS)
QUEUE_IMAGES = Signal(
    "bcd_queue_images", "gauge", "Decoded images that wait for the model, of a replica.", ("model",)
)
QUEUE_SECONDS = Signal(
    "bcd_queue_seconds", "histogram", "Seconds that decoded images waited.", ("model",), SECONDS
)
SIGNALS = (
    *(REQUESTS, REQUEST_SECONDS, PREDICTIONS, PROBABILITY, NOVELTY, WARNINGS, IMAGE_ERRORS),
    *(BATCH_IMAGES, BATCH_SECONDS, QUEUE_IMAGES, QUEUE_SECONDS),
)


class Record(Protocol):
    """Adds to a counter, sets a gauge, or counts a value of a histogram."""

    def __call__(self, signal: Signal, value: float = 1.0, /, **labels: str) -> None:
        """Record one value; `labels` are those of the signal."""


def silent(signal: Signal, value: float = 1.0, /, **labels: str) -> None:
    """A `Record` that keeps nothing."""


def record_answer(
    record: Record, predicted_class: str, probability: float, novelty: float | None, warnings: Iterable[str]
) -> None:
    """Record an image with an answer: its class, probability of malignancy, novelty over the cut-off if the
    model has one, and the codes of its warnings."""
    record(PREDICTIONS, predicted_class=predicted_class)
    record(PROBABILITY, probability)
    if novelty is not None:
        record(NOVELTY, novelty)
    for code in warnings:
        record(WARNINGS, code=code)
