import math

import pytest

from bcd.imaging import image
from bcd.slides import pixel_size

OME = """<?xml version="1.0" encoding="UTF-8"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">
<Image ID="Image:0"><Pixels ID="Pixels:0" SizeX="90" SizeY="60" PhysicalSizeX="9" PhysicalSizeY="9"/></Image>
<Image ID="Image:1"><Pixels ID="Pixels:1" SizeX="900" SizeY="600" {}/></Image></OME>"""


def chosen(x=None, y=None, ome="", **given):
    """The scale of a slide of 900 x 600 px."""
    properties = {"openslide.mpp-x": x, "openslide.mpp-y": y, "tiff.ImageDescription": ome}
    properties = {name: str(value) for name, value in properties.items() if value is not None}
    return pixel_size.level0_mpp(properties, (900, 600), pixel_size.Given(**given))


def error_of(*args, **given):
    with pytest.raises(image.ImageError) as caught:
        chosen(*args, **given)
    return caught.value.code, caught.value.message


def physical(x, y=None, unit=None):
    units = f'PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"' if unit else ""
    return OME.format(f'PhysicalSizeX="{x}" PhysicalSizeY="{y or x}" {units}')


@pytest.mark.parametrize("pair", [(0.5, 0.5), (0.5, 0.25), (0.05, 0.05), (20, 20), (0.049_999_999, 0.06)])
def test_each_axis_is_what_the_file_states(pair):
    assert chosen(*pair) == pair


@pytest.mark.parametrize(
    ("x", "y", "code", "said"),
    [
        (
            0.003,
            0.003,
            "bad_mpp",
            "slide states 0.003 µm/px; between 0.05 and 20 are possible; --mpp gives it",
        ),
        (0.0005, 0.0005, "bad_mpp", "states 0.0005 µm/px;"),  # mm
        (0.049, 0.5, "bad_mpp", "states 0.049 µm/px across and 0.5 down"),
        (352.8, 352.8, "missing_mpp", "states 352.8 µm/px; between 0.05 and 20 are possible; --mpp gives it"),
        (20.1, 0.5, "missing_mpp", "states 20.1 µm/px across and 0.5 down"),
        (499, 499, "missing_mpp", "states 499 µm/px"),  # nm
        (0.5, None, "missing_mpp", "states 0.5 µm/px across and nothing down"),
        (None, 0.5, "missing_mpp", "states nothing µm/px across and 0.5 down"),
        (None, None, "missing_mpp", "the slide does not say how many µm a pixel has; --mpp gives it"),
        ("nan", "nan", "missing_mpp", "does not say"),
        ("inf", "inf", "missing_mpp", "does not say"),
        (0, 0, "missing_mpp", "does not say"),
        (-0.5, -0.5, "missing_mpp", "does not say"),
        ("", "unknown", "missing_mpp", "does not say"),
    ],
)
def test_what_cannot_be_is_an_error_that_the_flag_puts_right(x, y, code, said):
    found, message = error_of(x, y)
    assert found == code
    assert said in message
    if 0.5 not in (x, y):
        assert chosen(x, y, fallback=0.25) == (0.25, 0.25)
    assert chosen(x, y, override=(0.25, 0.25)) == (0.25, 0.25)
    if x == 0.003:
        assert chosen(x, y, manifest=0.3) == (0.3, 0.3)


def test_a_flag_fills_in_an_axis_only_where_the_other_agrees():
    assert chosen(0.5, None, fallback=0.499) == (0.499, 0.499)
    said = "--mpp states 0.25 µm/px across, the slide 0.5; --mpp-override says what is right"
    assert error_of(0.5, None, fallback=0.25) == ("bad_mpp", said)


def test_the_manifest_counts_and_has_to_agree():
    assert chosen(manifest=0.5) == (0.5, 0.5)
    assert chosen(manifest=0.5, fallback=0.25) == (0.5, 0.5)
    assert chosen(0.499, 0.499, manifest=0.5) == (0.5, 0.5)
    assert chosen(0.499, 0.499, fallback=0.25) == (0.499, 0.499)
    said = "the slide states 0.25 µm/px across, the manifest 0.5; --mpp-override says what is right"
    assert error_of(0.25, 0.25, manifest=0.5) == ("bad_mpp", said)
    said = "the slide states 0.25 µm/px down, the manifest 0.5; --mpp-override says what is right"
    assert error_of(0.5, 0.25, manifest=0.5) == ("bad_mpp", said)
    assert chosen(0.5, 0.25, manifest=0.5, override=(0.3, 0.3)) == (0.3, 0.3)


@pytest.mark.parametrize("mpp", [0.003, 0, -1.0, 25.0, math.inf, math.nan])
def test_a_manifest_that_states_what_cannot_be_is_an_error(mpp):
    code, message = error_of(0.5, 0.5, manifest=mpp)
    assert code == "bad_mpp"
    assert "the manifest states" in message


@pytest.mark.parametrize(
    ("value", "unit", "mpp"),
    [
        ("0.5", None, 0.5),
        ("0.5", "µm", 0.5),
        ("0.5", "μm", 0.5),
        ("500", "nm", 0.5),
        ("0.0005", "mm", 0.5),
        ("5.0E-5", "cm", 0.5),
        ("5000", "Å", 0.5),
        ("0.00001", "in", 0.254),
    ],
)
def test_an_ome_tiff_states_it_with_its_unit(value, unit, mpp):
    """Of the image that has the size of level 0; the first, a small one, has another."""
    found = chosen(ome=physical(value, unit=unit))
    assert found == (pytest.approx(mpp), pytest.approx(mpp))


def test_ome_counts_before_a_resolution_that_cannot_be_and_must_agree_with_one_that_can():
    assert chosen(352.8, 352.8, physical("0.5", "0.25")) == (0.5, 0.25)
    assert chosen(0.499, 0.499, physical("0.5")) == (0.5, 0.5)
    said = "the slide states 0.25 µm/px across, its OME-XML 0.5; --mpp-override says what is right"
    assert error_of(0.25, 0.25, physical("0.5")) == ("bad_mpp", said)
    assert error_of(None, None, physical("0.0005"))[0] == "bad_mpp"


@pytest.mark.parametrize(
    "ome",
    [
        physical("1", unit="pixel"),
        physical("wide"),
        OME.format(""),
        "<OME",
        "<OME>&bomb;</OME>",
        '<!DOCTYPE x [<!ENTITY a "0.5">]>' + OME.format('PhysicalSizeX="&a;" PhysicalSizeY="&a;"'),
        physical("0.5").replace("900", "901"),
        "a scan of 0.5 µm",
    ],
)
def test_what_ome_does_not_say_is_missing(ome):
    assert error_of(None, None, ome) == (
        "missing_mpp",
        "the slide does not say how many µm a pixel has; --mpp gives it",
    )
