import numpy as np
import pyarrow as pa

from bcd import schema
from bcd.config.training import TrainConfig
from bcd.preflight.dry_run import measure
from tests import pictures


def rows(tmp_path, n):
    for i in range(n):
        (tmp_path / f"{i}.png").write_bytes(pictures.encode(pictures.gradient(40 + i, 60)))
    (tmp_path / "0.png").write_bytes(b"no image")
    table = [{schema.IMAGE_ID: f"{i}", schema.URI: str(tmp_path / f"{i}.png")} for i in range(n)]
    return pa.Table.from_pylist(table, schema=schema.INDEX)


def test_a_sample_is_taken_over_all_rows_and_names_what_is_broken(tmp_path):
    found = measure.read_sample(rows(tmp_path, 12), 32, 48, n=4)
    assert found.images.shape == (4, 32, 48, 3)
    assert len(found.errors) == 1
    assert not found.images[0].any()
    assert found.images[1:].reshape(3, -1).any(1).all()
    assert found.seconds > 0
    assert measure.read_sample(rows(tmp_path, 2), 32, 48).images.shape[0] == 2


def test_a_batch_consists_of_copies():
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] + np.zeros((3, 2, 2, 3), np.uint8)
    assert measure._repeated(images, 32, "cpu")[:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert len(measure._repeated(images, 4, "cpu")) == 4
    assert len(measure._repeated(images, 32, "cuda")) == 32


def test_only_steps_after_the_first_are_measured(monkeypatch):
    clock = iter([10.0, 16.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    steps = []
    assert measure._seconds(lambda: steps.append(1), 4) == 6 / measure.MEASURED_STEPS / 4
    assert len(steps) == 1 + measure.MEASURED_STEPS


def test_a_pace_states_the_bytes_of_the_network():
    config = TrainConfig(
        data="d", architecture="resnet18", input_height_px=32, input_width_px=32, batch_size=2
    )
    pace = measure.training_pace(config, np.zeros((1, 32, 32, 3), np.uint8))
    assert 44e6 < pace.n_bytes < 46e6  # 11.2 million parameters
    assert min(pace.train, pace.forward) > 0
    assert (pace.n_images, pace.is_gpu) == (2, False)
