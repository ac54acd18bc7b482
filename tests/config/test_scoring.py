from typing import get_args

import pytest

from bcd.config.options import CLOSED_FORM, Cam
from bcd.config.scoring import ScoreConfig
from bcd.errors import ConfigError
from bcd.model import cam


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"cam_layer": "layer3"}, "--cam-layer layer3 needs another --cam, such as gradcam or layercam"),
        ({"cam": "guesscam"}, "--cam input should be 'evidence', 'gradcam'"),
        ({"mpp": 0}, "--mpp input should be greater than 0, not 0"),
        ({"mpp": 0.003}, "--mpp 0.003: between 0.05 and 20 µm/px are possible"),
        ({"mpp_override": 25}, "--mpp-override 25: between 0.05 and 20 µm/px are possible"),
        ({"tile_mpp": 0.01}, "--tile-mpp 0.01: between 0.05 and 20 µm/px are possible"),
        ({"mpp": float("nan")}, "--mpp input should be a finite number, not nan"),
        ({"mpp_override": float("inf")}, "--mpp-override input should be a finite number, not inf"),
        ({"min_tissue": 1.5}, "--min-tissue input should be less than or equal to 1, not 1.5"),
        ({"max_workers": 0}, "--max-workers input should be greater than or equal to 1, not 0"),
        ({"engine": "openvino", "compile": "on"}, "--compile on is torch's compiler: leave it out with"),
        ({"classes": 2}, "--classes extra inputs are not permitted"),
    ],
)
def test_contradictions_of_scoring_name_the_flag(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ScoreConfig(model="m", input="i", output="o", **settings)


def test_another_method_explains_any_layer():
    config = ScoreConfig(model="m", input="i", output="o", cam="layercam", cam_layer="layer2")
    assert (config.cam, config.cam_layer) == ("layercam", "layer2")


def test_every_cam_method_can_be_asked_for():
    assert set(get_args(Cam)) == {CLOSED_FORM, *cam.METHODS}
