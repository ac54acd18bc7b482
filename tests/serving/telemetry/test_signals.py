"""What is counted of requests, and that no label says anything of an image or a caller."""

import json
import re
import threading
from pathlib import Path

import httpx
import pytest
import yaml

from bcd.model import predictor
from bcd.serving import api
from bcd.serving.telemetry import signals
from bcd.serving.telemetry.signals import SIGNALS
from tests import pictures
from tests.model.test_bundle import card, untrained
from tests.service import TOKEN, LocalEngine, guarded, serving
from tests.serving.test_api import statistics

ROOT = Path(__file__).parent.parent.parent.parent
DASHBOARD = json.loads((ROOT / "deploy/grafana.json").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs/operations/monitoring.md").read_text(encoding="utf-8")
FIELD = pictures.encode(pictures.gradient(92, 200))
PATIENT = "Surname_1950"


class Recorder:
    """A `signals.Record` that keeps everything."""

    def __init__(self):
        self.kept, self.more = [], threading.Condition()

    def __call__(self, signal, value=1.0, /, **labels):
        assert labels.keys() | {"model"} >= set(signal.labels) >= labels.keys()
        with self.more:
            self.kept.append((signal, value, labels))
            self.more.notify_all()

    def of(self, signal):
        return [(value, *labels.values()) for kept, value, labels in self.kept if kept is signal]

    def requests(self, count):
        """What was recorded of `count` requests. A request is counted after its caller has the answer."""
        with self.more:
            assert self.more.wait_for(lambda: len(self.of(signals.REQUEST_SECONDS)) >= count, 30)
        return self.of(signals.REQUESTS)


@pytest.fixture(scope="module")
def loaded():
    known = card(feature_statistics=statistics(cutoff=1e-9))
    return predictor.from_state(untrained().state_dict(), known)


@pytest.fixture
def recorder(loaded):
    return Recorder()


@pytest.fixture
def client(loaded, recorder):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    app = guarded(LocalEngine(loaded), named=api.Named(record=recorder))
    with serving(app) as url, httpx.Client(base_url=url, headers=headers, timeout=60) as opened:
        yield opened


def test_answers_are_counted_with_their_numbers(client, recorder):
    answer = client.post("/v1/predict", content=FIELD).json()
    client.post("/v1/predict/batch", files=[("files", ("a", FIELD)), ("files", ("b", b"text"))])
    client.post("/v1/predict", content=FIELD, headers={"Accept": "image/png"})
    assert recorder.of(signals.PREDICTIONS) == 3 * [(1.0, answer["predicted_class"])]
    probabilities = [value for (value,) in recorder.of(signals.PROBABILITY)]
    assert probabilities == pytest.approx(3 * [answer["probability_malignant"]], abs=1e-6)
    ratios = [value for (value,) in recorder.of(signals.NOVELTY)]
    assert ratios == pytest.approx(3 * [answer["novelty"] / 1e-9], rel=1e-4)
    assert recorder.of(signals.WARNINGS) == 3 * [(1.0, "unlike_training_data")]
    assert recorder.of(signals.IMAGE_ERRORS) == [(1.0, "unsupported_format")]


def test_requests_are_counted_by_route_status_and_code(client, recorder):
    client.post("/v1/predict", content=FIELD)
    client.post("/v1/predict", content=b"")
    client.post("/v1/predict?x=1", content=FIELD)
    client.get("/v1/model", headers={"Authorization": "Bearer wrong"})
    client.get("/healthz")
    client.get("/v1/models/default")
    assert recorder.requests(6) == [
        (1.0, "/v1/predict", "200", "none"),
        (1.0, "/v1/predict", "422", "empty"),
        (1.0, "/v1/predict", "422", "unknown_option"),
        (1.0, "/v1/model", "401", "unauthorized"),
        (1.0, "/healthz", "200", "none"),
        (1.0, "/v1/models/NAME", "200", "none"),
    ]
    seconds = recorder.of(signals.REQUEST_SECONDS)
    assert [route for _, route in seconds] == [row[1] for row in recorder.of(signals.REQUESTS)]
    assert all(0 < value < 60 for value, _ in seconds)


def test_what_a_caller_chose_is_in_no_label(client, recorder):
    """Names in paths, queries, forms and headers; and few routes, whatever is asked for."""
    name, other = f"{PATIENT}.png", {"Authorization": f"Bearer {PATIENT}"}
    for path in (f"/{PATIENT}", f"/v1/models/{PATIENT}", f"/v1/models/{PATIENT}/predict", f"/page/{PATIENT}"):
        client.get(path)
        client.post(path, content=FIELD, headers=other)
    client.get(f"/v1/slides/{PATIENT}/{PATIENT}?x={PATIENT}", headers={"X-Error-Code": PATIENT})
    client.get(f"/v1/view/pixels/{PATIENT}?name={PATIENT}")
    client.post("/v1/predict", files={"file": (name, FIELD)})
    client.post("/v1/predict/batch", files=[("files", (name, FIELD)), ("files", (name, b"text"))])
    client.post(f"/v1/predict?{PATIENT}={PATIENT}", content=FIELD)
    counted = {row[1] for row in recorder.requests(13)}
    said = {text for _, _, labels in recorder.kept for text in labels.values()}
    assert not [text for text in said if "1950" in text or TOKEN in text]
    assert counted == {
        *("another address", "/v1/models/NAME", "/v1/models/NAME/predict", "/page/", "/v1/slides/"),
        *("/v1/view/pixels/", "/v1/predict", "/v1/predict/batch"),
    }


def test_a_model_without_statistics_has_no_novelty():
    recorder = Recorder()
    signals.record_answer(recorder, "benign", 0.25, None, [])
    assert [(signal.name, value) for signal, value, _ in recorder.kept] == [
        ("bcd_predictions", 1.0),
        ("bcd_probability_malignant", 0.25),
    ]


def test_names_are_unique_and_labels_are_few():
    assert len({signal.name for signal in SIGNALS}) == len(SIGNALS)
    assert all(re.fullmatch("bcd_[a-z_]+", signal.name) and signal.text.endswith(".") for signal in SIGNALS)
    labels = {label for signal in SIGNALS for label in signal.labels}
    assert labels == {"route", "status", "code", "model", "predicted_class"}
    assert all(bool(signal.bounds) == (signal.kind == "histogram") for signal in SIGNALS)
    assert all([*signal.bounds] == sorted(signal.bounds) for signal in SIGNALS)


# ---- the dashboard and the alerts


def queries():
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def alerts():
    rules = yaml.safe_load(re.search(r"```yaml\n(groups:.*?)```", PAGE, re.S)[1])
    return [rule for group in rules["groups"] for rule in group["rules"]]


def named(expressions):
    """Series that expressions name; of a histogram its buckets, for its count."""
    found = {name for text in expressions for name in re.findall(r"\bray_\w+", text)}
    return {re.sub("_count$", "_bucket", name) for name in found}


def test_the_dashboard_shows_every_metric_and_no_other():
    assert named(queries()) == {signal.exported for signal in SIGNALS}


def test_the_alerts_ask_for_metrics_that_exist():
    expressions = [rule["expr"] for rule in alerts()]
    assert len(expressions) >= 6
    assert named(expressions) <= {signal.exported for signal in SIGNALS}


def test_the_page_names_every_metric_and_its_labels():
    rows = re.findall(r"^\| `(ray_bcd_\w+)` \| (.*?) \|", PAGE, re.M)
    assert rows == [
        (signal.exported, ", ".join(f"`{label}`" for label in signal.labels)) for signal in SIGNALS
    ]


def test_queries_ask_for_labels_that_exist():
    known = {signal.exported: {*signal.labels, "le"} for signal in SIGNALS}
    for text in [*queries(), *(rule["expr"] for rule in alerts())]:
        labels = {label for name in named([text]) for label in known[name]}
        asked = {label for group in re.findall(r"by \(([^)]*)\)", text) for label in group.split(", ")}
        for group in re.findall(r"\{([^}]*)\}", text):
            asked |= set(re.findall(r"(\w+)[=!]", group))
        assert asked <= labels, text


def test_the_dashboard_is_one_that_grafana_reads():
    """As far as its model of panels says: a data source by variable, ids, places that do not overlap."""
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource"]
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = set()
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & places
        assert at["x"] + at["w"] <= 24
        places |= cells
