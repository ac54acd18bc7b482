"""Metrics of the service by Ray, which collects them from every process of a node and exports them there."""

from ray.util import metrics

from bcd.serving.telemetry.signals import Signal


class RayMeter:
    """A `signals.Record`; `always` are labels of this process, such as its model."""

    def __init__(self, **always: str) -> None:
        self._always = always
        self._made: dict[str, metrics.Metric] = {}

    def __call__(self, signal: Signal, value: float = 1.0, /, **labels: str) -> None:
        """See `signals.Record`."""
        made = self._made.get(signal.name) or self._made.setdefault(signal.name, _make(signal))
        tags = {name: text for name, text in (self._always | labels).items() if name in signal.labels}
        match made:
            case metrics.Counter():
                made.inc(value, tags)
            case metrics.Gauge():
                made.set(value, tags)
            case metrics.Histogram():
                made.observe(value, tags)


def _make(signal: Signal) -> metrics.Metric:
    described = signal.name, signal.text
    if signal.kind == "histogram":
        return metrics.Histogram(*described, boundaries=list(signal.bounds), tag_keys=signal.labels)
    kind = metrics.Counter if signal.kind == "counter" else metrics.Gauge
    return kind(*described, tag_keys=signal.labels)
