import base64
import io

import numpy as np
import pytest
from PIL import Image

from bcd import taxonomy
from bcd.model import predictor, weights
from bcd.reports import overlay
from bcd.serving import documents
from tests import pictures
from tests.model.test_bundle import card

PIXELS = pictures.gradient(92, 200)


@pytest.fixture(scope="module")
def eight():
    """A bundle for the eight subtypes."""
    names = taxonomy.classes("subtype")
    facts = card(target="subtype", classes=names)
    return predictor.from_state(weights.build(8, seed=1, architecture="resnet18").state_dict(), facts)


def test_of_eight_classes_the_map_explains_the_predicted_one(eight):
    prediction = eight.predict(eight.fit(PIXELS)[None])
    found = documents.answer(eight.card, "id", b"", PIXELS, prediction)
    assert found.evidence.explains == f"{found.predicted_class} against the rest"
    centred = prediction.logit[0].max() - prediction.logit[0].mean()
    assert np.mean(found.evidence.values) + found.evidence.bias == pytest.approx(centred, abs=1e-4)
    p = found.probability_malignant
    assert found.log_odds == pytest.approx(np.log(p / (1 - p)), abs=1e-4)
    assert sum(found.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert list(found.probabilities) == list(eight.card.classes)


def test_the_map_covers_what_the_overlay_draws(eight):
    """Enlarging the covered part over the image is what `bcd.reports.overlay` does."""
    prediction = eight.predict(eight.fit(PIXELS)[None])
    covers = documents.answer(eight.card, "id", b"", PIXELS, prediction).evidence.covers
    values = prediction.evidence[0]
    box = np.array([covers.left, covers.top, covers.right, covers.bottom])
    box *= [values.shape[1], values.shape[0]] * 2
    enlarged = Image.fromarray(values).resize((200, 92), Image.Resampling.BILINEAR, box=tuple(box))
    expected = overlay.overlay(PIXELS, prediction.evidence[0], 1.0, 64, 96)
    np.testing.assert_array_equal(overlay.overlay(PIXELS, np.asarray(enlarged), 1.0), expected)


def test_a_large_image_has_a_small_preview(eight):
    large = pictures.gradient(1_100, 2_200)
    prediction = eight.predict(eight.fit(large)[None])
    found = documents.answer(eight.card, "id", b"", large, prediction, with_preview=True)
    assert Image.open(io.BytesIO(base64.b64decode(found.preview_png))).size == (1024, 512)
    assert (found.width_px, found.height_px) == (2_200, 1_100)
    assert found.overlay_png is None


def test_a_map_that_adds_up_to_nothing_has_no_bias_and_a_scale_of_its_own(eight):
    prediction = eight.predict(eight.fit(PIXELS)[None], "gradcam")
    found = documents.answer(eight.card, "id", b"", PIXELS, prediction)
    assert found.evidence.bias is None
    assert found.evidence.limit == overlay.scale([prediction.evidence[0]]) < overlay.LIMIT
    assert documents.drawn_limit(prediction) == found.evidence.limit
    assert documents.Answer.model_validate_json(found.model_dump_json()) == found
    assert documents.scale_of(eight.card).unit == "log-odds per cell"
    other = eight.card.model_copy(update={"evidence": "gradcam"})
    assert documents.scale_of(other).unit.startswith("Grad-CAM")
