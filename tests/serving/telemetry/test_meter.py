"""Metrics as Ray takes them, in this process without a cluster, and as its exporter names them."""

import prometheus_client
import pytest
from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder
from ray.util import metrics

from bcd.serving.telemetry import signals
from bcd.serving.telemetry.meter import RayMeter


@pytest.fixture
def recorded(monkeypatch):
    """What reaches Ray: kind, name, value and labels."""
    found = []

    def record(self, value, tags):
        self._validate_tags(self._get_final_tags(tags))
        assert tags.keys() == set(self._tag_keys)
        found.append((type(self).__name__.lower(), self._name, value, tags))

    monkeypatch.setattr(metrics.Metric, "_record", record)
    return found


@pytest.mark.parametrize("signal", signals.SIGNALS, ids=lambda signal: signal.name)
def test_each_signal_is_one_that_ray_takes(signal, recorded):
    meter = RayMeter(model="default")
    labels = {name: name for name in signal.labels if name != "model"}
    for value in (1.0, 2.0):
        meter(signal, value, **labels)
    tags = labels | ({"model": "default"} if "model" in signal.labels else {})
    assert recorded == [(signal.kind, signal.name, value, tags) for value in (1.0, 2.0)]
    assert len(meter._made) == 1


def test_a_label_that_is_missing_is_an_error(recorded):
    with pytest.raises(ValueError, match="Missing value for tag key"):
        RayMeter(model="default")(signals.WARNINGS)


def test_series_are_named_as_ray_exports_them():
    """By Ray's own exporter: the dashboard and the alerts ask by these names."""
    exporter = OpenTelemetryMetricRecorder(gauge_metric_ttl_seconds=60)
    for signal in signals.SIGNALS:
        tags = dict.fromkeys(signal.labels, "x")
        match signal.kind:
            case "histogram":
                exporter.register_histogram_metric(signal.name, signal.text, list(signal.bounds))
                exporter.set_metric_value(signal.name, tags, 1.0)
            case "counter":
                exporter.register_counter_metric(signal.name, signal.text)
                exporter.set_metric_value(signal.name, tags, 1.0)
            case "gauge":
                exporter.register_gauge_metric(signal.name, signal.text)
                exporter.set_metric_value(signal.name, tags, 1.0)
    lines = prometheus_client.generate_latest().decode().splitlines()
    names = {line.partition("{")[0] for line in lines if line.startswith("ray_bcd")}
    assert {signal.exported for signal in signals.SIGNALS} <= names
    # 1.0 is in the bucket that ends with it: no novelty above the cut-off.
    (bucket,) = [
        line for line in lines if line.startswith("ray_bcd_novelty_ratio_bucket") and 'le="1.0"' in line
    ]
    assert bucket.endswith(" 1.0")
