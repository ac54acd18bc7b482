"""What timm states, licences that are said first, and downloads that fail; nothing is downloaded."""

import builtins
import re

import pytest
import torch
from safetensors.torch import save_file

from bcd.errors import BundleError, ConfigError
from bcd.model import weights
from bcd.model.networks import timm_weights

timm = pytest.importorskip("timm", reason="needs the extra `timm`")

SIZE = (64, 96)
UNI = "hf-hub:MahmoodLab/UNI"


@pytest.fixture(autouse=True)
def nothing_was_said():
    timm_weights.announce.cache_clear()


def refuse(*args, **kwargs):
    raise OSError("the network is unreachable\nand more")


def test_what_timm_states_is_found_by_name():
    assert timm_weights.stated("timm:test_vit", "none") == (160, 160, (0.5,) * 3, (0.5,) * 3)


def test_what_no_card_can_have_is_rejected(monkeypatch):
    monkeypatch.setattr(timm_weights, "config_of", lambda name: {"mean": (0.5, 0.5, 7), "std": (1, 1, 1)})
    with pytest.raises(BundleError, match=r"timm states Stated\(.*expected 32 to 4096 px and numbers from 0"):
        timm_weights.stated("timm:test_vit", "none")


def test_without_timm_there_is_a_sentence_with_the_command(monkeypatch):
    real = builtins.__import__

    def without(name, *args):
        if name == "timm":
            raise ImportError("No module named 'timm'", name="timm")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"\(timm is missing\); run: pip install 'timm>="):
        weights.build(2, architecture="timm:test_vit")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (UNI, "licence CC-BY-NC-ND-4.0; no commercial use; gated: ask .*fits --architecture timm:vit_large"),
        ("hf-hub:owkin/phikon", "licence Owkin non-commercial; no commercial use; it is no network of timm"),
        ("hf-hub:someone/else@main", "unknown licence: check"),
    ],
)
def test_terms_are_said_before_a_download_fails(monkeypatch, caplog, name, said):
    monkeypatch.setattr(timm.models, "load_model_config_from_hf", refuse)
    monkeypatch.setattr(timm.models, "load_state_dict_from_hf", refuse)
    with pytest.raises(
        BundleError, match=r"the download through timm failed \(OSError: the network is unrea"
    ):
        timm_weights.stated("timm:test_vit", name)
    with pytest.raises(BundleError, match="unreachable\\); give the URI of a state dict"):
        weights.pretrained(name, "timm:test_vit", SIZE)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert re.search(said, record.message)


def test_the_page_of_weights_states_their_colours(monkeypatch):
    page = {"input_size": (3, 96, 96), "mean": (0.7, 0.6, 0.5), "std": (0.2, 0.3, 0.4)}
    monkeypatch.setattr(timm.models, "load_model_config_from_hf", lambda name: (page, "vit", {}))
    assert timm_weights.stated("timm:test_vit", UNI) == (96, 96, page["mean"], page["std"])


def test_a_download_of_timm_fails_with_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(timm.models.vision_transformer, "build_model_with_cfg", refuse)
    with pytest.raises(BundleError, match="--weights imagenet: the download through timm failed"):
        weights.pretrained("imagenet", "timm:test_vit", SIZE)
    assert "--weights imagenet: licence apache-2.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("architecture", "given", "expected"),
    [
        ("timm:test_vit", UNI, "CC-BY-NC-ND-4.0"),
        ("resnet50", "hf-hub:someone/else", timm_weights.UNKNOWN),
        ("timm:test_vit", "imagenet", "apache-2.0"),
        ("timm:test_vit", "mine.safetensors", None),
        ("resnet50", "imagenet", None),
    ],
)
def test_a_licence_is_that_of_the_weights(architecture, given, expected):
    assert timm_weights.license_of(architecture, given) == expected


# ---- weights of users --------------------------------------------------------------------------------------


def published(name, n_classes=5, size=None):
    """A network of timm as its users save it."""
    torch.manual_seed(3)
    return timm.create_model(name, num_classes=n_classes, **({"img_size": size} if size else {})).eval()


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
def test_a_file_of_timm_gives_the_same_logits(tmp_path, name):
    """Its head, too, where its classes are as many."""
    size = SIZE if name == "test_vit" else None
    theirs = published(name, 2, size)
    save_file(
        {f"module.{key}": value for key, value in theirs.state_dict().items()}, tmp_path / "w.safetensors"
    )
    given = weights.pretrained(str(tmp_path / "w.safetensors"), f"timm:{name}", SIZE)
    ours = weights.build(2, given, 0, f"timm:{name}", SIZE).eval()
    images = torch.randn(2, 3, *SIZE)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-4)
    eight = weights.build(8, given, 0, f"timm:{name}", SIZE)
    assert len(eight.fc.weight) == 8
    assert torch.equal(next(eight.body.parameters()), next(theirs.parameters()))


def test_embeddings_of_positions_are_interpolated_as_timm_does(tmp_path):
    theirs = published("test_vit")
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "w.pth")
    given = weights.pretrained(str(tmp_path / "w.pth"), "timm:test_vit", SIZE)
    theirs.set_input_size(img_size=SIZE)
    assert torch.equal(given["body.pos_embed"], theirs.pos_embed)
    assert torch.equal(given["body.blocks.1.mlp.fc1.weight"], theirs.blocks[1].mlp.fc1.weight)
    assert "fc.weight" not in given or len(given["fc.weight"]) == 5


def test_weights_of_another_network_are_rejected(tmp_path):
    save_file(published("test_vit2").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(BundleError, match=r"w\.safetensors: not the weights of a timm:test_vit: "):
        weights.pretrained(str(tmp_path / "w.safetensors"), "timm:test_vit", SIZE)


def test_weights_of_the_hub_are_read_as_those_of_a_file(monkeypatch):
    theirs = published("test_resnet", 0)
    monkeypatch.setattr(
        timm.models, "load_state_dict_from_hf", lambda name, weights_only: theirs.state_dict()
    )
    given = weights.pretrained("hf-hub:someone/else", "timm:test_resnet", SIZE)
    ours = weights.build(2, given, 0, "timm:test_resnet", SIZE).eval()
    images = torch.randn(2, 3, *SIZE)
    torch.testing.assert_close(ours.body(images), theirs(images))
