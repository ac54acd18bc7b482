import base64
import io

import numpy as np
from PIL import Image

from bcd.imaging import image
from bcd.reports import overlay, thumbnails
from bcd.reports.thumbnails import Example
from tests import pictures


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_an_image_is_unchanged_in_a_page():
    pixels = pictures.gradient(92, 140)
    uri = thumbnails.data_uri(pixels, "PNG")
    assert uri.startswith("data:image/png;base64,")
    assert (decoded(uri) == pixels).all()
    assert np.abs(decoded(thumbnails.data_uri(pixels)).astype(int) - pixels).mean() < 3


def test_an_example_is_drawn_with_its_map_at_the_size_in_which_it_is_shown():
    pixels, evidence = pictures.gradient(460, 700), np.array([[4.0, -4.0]])
    one = Example("a.png", 0.9, "malignant", 2.2, pixels, evidence)
    drawn = thumbnails.draw_example(one, 4.0, (224, 336), max_width_px=350)
    assert drawn["example"] is one
    assert decoded(drawn["picture"]).shape == decoded(drawn["overlay"]).shape == (230, 350, 3)
    small = image.shrink(pixels, 700, 350)
    expected = overlay.overlay(small, evidence, 4.0, 224, 336)
    assert np.abs(decoded(drawn["overlay"]).astype(int) - expected).mean() < 4
