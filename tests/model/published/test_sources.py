import json

import pytest

from bcd.config.signing import ImportConfig
from bcd.errors import BundleError, ConfigError
from bcd.model.published import sources

WSINFER = {
    "spec_version": "1.0",
    "architecture": "resnet34",
    "num_classes": 2,
    "class_names": ["Other", "Tumor"],
    "patch_size_pixels": 350,
    "spacing_um_px": 0.25,
    "transform": [
        {"name": "Resize", "arguments": {"size": 224}},
        {"name": "ToTensor"},
        {"name": "Normalize", "arguments": {"mean": [0.72, 0.57, 0.68], "std": [0.11, 0.15, 0.11]}},
    ],
}
TIMM = {
    "architecture": "resnet50",
    "num_classes": 3,
    "label_names": ["a", "b", "c"],
    "pretrained_cfg": {
        "input_size": [3, 96, 96],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
    },
}


def config(published, **flags):
    return ImportConfig(published=published, weights="/data/w.pth", output="out", **flags)


def found(tmp_path, content, publisher="wsinfer", **flags):
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return sources.read_source(config(publisher, publisher_config=str(path), **flags))


def test_tiatoolbox_scales_to_0_to_1_and_no_more():
    pcam = sources.read_source(config("tiatoolbox:resnet50-pcam"))
    assert (pcam.architecture, pcam.malignant, pcam.mpp, pcam.tile_px) == ("resnet50", ("tumour",), 1.0, 96)
    assert (pcam.mean, pcam.std, pcam.input_px) == ((0, 0, 0), (1, 1, 1), 96)
    kather = sources.read_source(config("tiatoolbox:resnet18-kather100k"))
    assert (kather.classes.index("TUM"), len(kather.classes), kather.input_px) == (3, 9, 224)
    assert "CC-BY-4.0" in kather.license
    assert "not of the breast" in kather.trained_on


def test_wsinfers_tiles_are_resized_to_the_input(tmp_path):
    source = found(tmp_path, WSINFER, malignant=("Tumor",), license="x")
    assert (source.tile_px, source.input_px, source.mpp) == (350, 224, 0.25)
    assert (source.mean, source.std) == ((0.72, 0.57, 0.68), (0.11, 0.15, 0.11))
    assert (source.license, source.source) == ("x", "wsinfer: w.pth")


def test_a_flag_says_which_class_is_malignant(tmp_path):
    with pytest.raises(ConfigError, match="wsinfer does not state everything: give --malignant"):
        found(tmp_path, WSINFER)
    with pytest.raises(ConfigError, match="--malignant Cancer: expected some of Other, Tumor"):
        found(tmp_path, WSINFER, malignant=("Cancer",))
    with pytest.raises(ConfigError, match="all classes; expected another one"):
        found(tmp_path, WSINFER, malignant=("Other", "Tumor"))


def test_a_flag_does_not_contradict_the_publisher(tmp_path):
    with pytest.raises(ConfigError, match=r"--mpp 0.5: the publisher states 0.25"):
        found(tmp_path, WSINFER, malignant=("Tumor",), mpp=0.5)
    assert found(tmp_path, WSINFER, malignant=("Tumor",), mpp=0.25).mpp == 0.25


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"name": "ToTensor"}, {"name": "Resize", "arguments": {"size": 224}}], "ToTensor and Resize"),
        ([{"name": "Resize", "arguments": {"size": [224, 96]}}, {"name": "ToTensor"}], "Resize {'size': "),
        ([{"name": "Resize", "arguments": {"size": 9, "max_size": 9}}, {"name": "ToTensor"}], "max_size"),
        ([{"name": "CenterCrop", "arguments": {"size": 224}}, {"name": "ToTensor"}], "CenterCrop"),
        ([{"name": "Resize", "arguments": {"size": 224}}], "its transform, Resize"),
        ([{"name": "ToTensor"}, {"name": "Normalize", "arguments": {"mean": [0, 0, 0]}}], "Normalize"),
    ],
)
def test_a_transform_that_cannot_be_applied_exactly_is_rejected(tmp_path, steps, said):
    with pytest.raises(BundleError, match=said) as caught:
        found(tmp_path, WSINFER | {"transform": steps}, malignant=("Tumor",))
    assert "expected Resize to a square of one size, ToTensor, and Normalize" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("<html>", "not the config.json that was expected: : Invalid JSON"),
        (WSINFER | {"spacing_um_px": 0}, "spacing_um_px: Input should be greater than 0"),
        ({}, "architecture: Field required"),
        (WSINFER | {"num_classes": 3}, "3 classes with 2 names"),
    ],
)
def test_what_is_no_config_of_wsinfer_is_rejected(tmp_path, content, said):
    with pytest.raises(BundleError, match=said):
        found(tmp_path, content, malignant=("Tumor",))


def timm(**changes):
    return TIMM | {"pretrained_cfg": TIMM["pretrained_cfg"] | changes}


def test_timms_config_has_classes_input_and_normalisation(tmp_path):
    source = found(tmp_path, TIMM, "timm", malignant=("c", "a"), mpp=0.5)
    assert (source.classes, source.input_px, source.tile_px) == (("a", "b", "c"), 96, 96)
    assert source.interpolation == "bicubic"
    with pytest.raises(BundleError, match=r"cropped to 0.875 of the image, cannot be made exactly"):
        found(tmp_path, timm(crop_pct=0.875), "timm", malignant=("c",))
    with pytest.raises(BundleError, match=r"by bicubic interpolation, a bundle by bilinear.*--tile-px 96"):
        found(tmp_path, TIMM, "timm", malignant=("c",), tile_px=128)
    assert (
        found(tmp_path, timm(interpolation="bilinear"), "timm", malignant=("c",), tile_px=128).tile_px == 128
    )


def test_without_a_config_flags_say_everything():
    flags = {"classes": ("tumor", "normal"), "malignant": ("tumor",), "input_px": 224}
    source = sources.read_source(config("torchvision:resnet50", **flags, mean=(0, 0, 0), std=(1, 1, 1)))
    assert (source.mean, source.std, source.mpp, source.tile_px) == ((0, 0, 0), (1, 1, 1), None, 224)
    assert sources.read_source(config("timm:resnet18.a1_in1k", **flags)).mean == (0.485, 0.456, 0.406)
    with pytest.raises(ConfigError, match="give --classes, --malignant and --input-px"):
        sources.read_source(config("torchvision:resnet50"))
    with pytest.raises(ConfigError, match="a name occurs twice"):
        sources.read_source(config("timm:resnet18", **flags | {"classes": ("tumor", "b", "b")}))


@pytest.mark.parametrize(
    ("published", "flags", "said"),
    [
        ("tiatoolbox:resnet50", {}, "expected ARCHITECTURE-pcam or ARCHITECTURE-kather100k"),
        ("wsinfer", {}, "the like; wsinfer, or timm, with --publisher-config"),
        ("timm:resnet50", {"publisher_config": "c.json"}, "expected tiatoolbox"),
        ("keras:resnet50", {}, "expected tiatoolbox"),
    ],
)
def test_an_unknown_publisher_is_rejected(published, flags, said):
    with pytest.raises(ConfigError, match=said):
        sources.read_source(config(published, **flags))


def test_other_networks_are_those_of_timm(tmp_path):
    flags = {"malignant": ("Tumor",)}
    assert (
        found(tmp_path, WSINFER | {"architecture": "inception_v4"}, **flags).architecture
        == "timm:inception_v4"
    )
    assert found(tmp_path, timm(), "timm", malignant=("c",)).architecture == "resnet50"


def test_tiatoolboxs_other_networks_are_rejected():
    with pytest.raises(BundleError, match="tiatoolbox: no 'densenet121' can be imported; expected resnet18"):
        sources.read_source(config("tiatoolbox:densenet121-pcam"))
