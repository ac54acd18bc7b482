"""What TensorBoard shows of a finished run: hyperparameters, test metrics, figures.

The worker writes the epochs; these events are of their own, in `tensorboard/test/`, and replace earlier ones.
"""

import io
import time
from typing import Any

from PIL import Image

from bcd import storage
from bcd.runtime import run_directory
from bcd.runtime.run_directory import FIGURES, METRICS
from bcd.runtime.tracking import values

# TensorBoard knows its files by `tfevents` in their names; the usual ones contain that of the host, too.
EVENTS = "tensorboard/test/events.out.tfevents.0"


def write_board(run_uri: str) -> None:
    """Write the events of a run whose test part is evaluated; raises StorageError."""
    # Not at the top: it takes a second, and other jobs do without.
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.plugins.hparams import summary_v2
    from tensorboard.summary.writer.record_writer import RecordWriter

    settings = run_directory.read_json(run_uri, run_directory.CONFIG)
    measured = run_directory.read_json(run_uri, METRICS)
    step = int(measured.get("best_epoch") or 0)  # JSON may have it as a float
    scalars = {f"test/{name}": value for name, value in values.metrics_of(measured).items()}
    shown = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    shown += [
        summary_pb2.Summary.Value(tag=tag, image=summary_pb2.Summary.Image(**image))
        for tag, image in _figures(run_uri).items()
    ]
    hyperparameters = values.settings_of(settings) | values.epoch_of(settings)  # numbers as numbers
    summaries = [
        summary_v2.hparams_config_pb(
            [summary_v2.HParam(name) for name in sorted(hyperparameters)],
            [summary_v2.Metric(tag) for tag in scalars],
        ),
        summary_v2.hparams_pb(hyperparameters, trial_id=settings["name"]),
        summary_pb2.Summary(value=shown),
    ]
    now, file = time.time(), io.BytesIO()
    writer = RecordWriter(file)
    writer.write(event_pb2.Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    for summary in summaries:
        writer.write(event_pb2.Event(wall_time=now, step=step, summary=summary).SerializeToString())
    storage.write_bytes(storage.join(run_uri, EVENTS), file.getvalue())


def _figures(run_uri: str) -> dict[str, dict[str, Any]]:
    """The figures of a report, as TensorBoard's images, by tag."""
    found = {}
    for file in storage.list_files_if_any(storage.join(run_uri, FIGURES)):
        if file.path.endswith(".png"):
            content = storage.read_bytes(file.uri)
            width, height = Image.open(io.BytesIO(content)).size
            size = {"width": width, "height": height, "colorspace": 3}
            found[f"{FIGURES}/{file.path.removesuffix('.png')}"] = {"encoded_image_string": content} | size
    return found
