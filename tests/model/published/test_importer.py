"""Files in the layouts of publishers, made here, against the forward pass that their libraries do."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save
from torch import nn
from torchvision import transforms

from bcd.config.signing import ImportConfig
from bcd.errors import BundleError, ConfigError
from bcd.metrics import calibration
from bcd.model import bundle, predictor
from bcd.model.card import model_id
from bcd.model.published import importer
from tests.model.published.test_sources import TIMM, WSINFER

SCALE_ONLY = transforms.ToTensor()


class CNNModel(nn.Module):
    """The layout and the forward pass of TIAToolbox's class of this name."""

    def __init__(self, network):
        super().__init__()
        self.feat_extract = nn.Sequential(*list(network.children())[:-2])
        self.pool = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier = network.fc

    def forward(self, images):
        return self.classifier(torch.flatten(self.pool(self.feat_extract(images)), 1))


@pytest.fixture(scope="module")
def images():
    """Tiles of 48 px in unlike colours, uint8."""
    random = np.random.default_rng(0)
    return [np.clip(random.normal(c, 40, (48, 48, 3)), 0, 255).astype(np.uint8) for c in (40, 110, 180, 230)]


def answering(network, head, inputs):
    """The network with logits of about 1, which differ between the inputs; rounding stays far below 1e-5."""
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            module.weight.data.fill_(0.3 if name.endswith("bn2") else 1.0)
    seen = []
    with torch.no_grad():
        network.train()(inputs)
        hook = head.register_forward_pre_hook(lambda module, given: seen.append(given[0].double()))
        network.eval()(inputs)
        hook.remove()
        mean, wanted = seen[0].mean(0), torch.randn(len(inputs), head.out_features).double()
        weight = (torch.linalg.pinv(seen[0] - mean) @ (wanted - wanted.mean(0))).T
        head.weight.copy_(weight)
        head.bias.copy_(-weight @ mean)
    return network


def classifier(n_classes, inputs):
    """A ResNet18 of torchvision that answers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(n_classes)
        network = torchvision.models.resnet18(num_classes=n_classes)
        return answering(network, network.fc, inputs)


def batch(images, transform=SCALE_ONLY):
    return torch.stack([transform(Image.fromarray(one)) for one in images])


@torch.inference_mode()
def logits(network, inputs):
    return network(inputs).numpy()


def stored(tmp_path, content, name="weights.pth"):
    torch.save(content, tmp_path / name)
    return str(tmp_path / name)


def imported(tmp_path, published, images, **flags):
    """The loaded bundle, and its prediction."""
    uri = str(tmp_path / "bundle")
    identity = importer.run(ImportConfig(published=published, output=uri, **flags))
    model = predictor.load(uri, device="cpu")
    assert model.model_id == identity
    return model, model.predict(np.stack([model.fit(one) for one in images]))


def softmax(values):
    return np.exp(values) / np.exp(values).sum(1, keepdims=True)


def require_equal(found, expected):
    assert np.ptp(expected, axis=0).max() > 0.05  # of equal answers, equality says nothing
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_tiatoolbox_on_pcam(tmp_path, images):
    tiles = [np.tile(one, (2, 2, 1)) for one in images]
    network = CNNModel(classifier(2, batch(tiles))).eval()
    file = stored(tmp_path, network.state_dict())
    model, found = imported(tmp_path, "tiatoolbox:resnet18-pcam", tiles, weights=file)
    require_equal(found.probability, softmax(logits(network, batch(tiles))))
    card = model.card
    assert (card.classes, card.target) == (("benign", "malignant"), "tumor_class")
    assert (card.mpp, card.field_height_px, card.input_width_px) == ((1.0,), 96, 96)
    assert np.isnan(found.novelty).all()
    np.testing.assert_allclose(
        found.evidence.mean((1, 2)) + found.evidence_bias,
        calibration.log_odds(found.logit, card.classes),
        1e-4,
        1e-4,
    )


def test_nine_classes_stay_and_the_tumour_is_malignant(tmp_path, images):
    tiles = [np.asarray(Image.fromarray(one).resize((224, 224))) for one in images]
    network = CNNModel(classifier(9, batch(tiles))).eval()
    file = stored(tmp_path, network.state_dict())
    model, found = imported(tmp_path, "tiatoolbox:resnet18-kather100k", tiles, weights=file)
    expected = softmax(logits(network, batch(tiles)))
    require_equal(found.probability, expected)
    np.testing.assert_allclose(found.probability_malignant, expected[:, 3], rtol=0, atol=1e-5)
    assert model.card.classes[:4] == ("benign:BACK", "benign:NORM", "benign:DEB", "malignant:TUM")
    assert found.predicted_class == [model.card.classes[i] for i in expected.argmax(1)]


@pytest.fixture
def zoo(tmp_path):
    """WSInfer's config.json with tiles of 48 px, resized to 32."""
    steps = [{"name": "Resize", "arguments": {"size": 32}}, *WSINFER["transform"][1:]]
    content = WSINFER | {"architecture": "resnet18", "patch_size_pixels": 48, "transform": steps}

    def write(**changes):
        (tmp_path / "config.json").write_text(json.dumps(content | changes))
        return {"publisher_config": str(tmp_path / "config.json"), "malignant": ("Tumor",)}

    return write


def wsinfers(images):
    _, _, normalize = WSINFER["transform"]
    steps = [transforms.Resize(32), transforms.ToTensor(), transforms.Normalize(**normalize["arguments"])]
    return batch(images, transforms.Compose(steps))


def test_wsinfer(tmp_path, images, zoo):
    network = classifier(2, wsinfers(images))
    (tmp_path / "model.safetensors").write_bytes(save(network.state_dict()))
    flags = zoo() | {"weights": str(tmp_path / "model.safetensors")}
    model, found = imported(tmp_path, "wsinfer", images, **flags)
    require_equal(found.probability, softmax(logits(network, wsinfers(images))))
    assert (model.card.field_width_px, model.card.input_width_px, model.card.mpp) == (48, 32, (0.25,))


def test_one_logit_is_a_sigmoid(tmp_path, images, zoo):
    network = classifier(1, wsinfers(images))
    flags = zoo(num_classes=1, class_names=["Tumor"]) | {"weights": stored(tmp_path, network.state_dict())}
    _, found = imported(tmp_path, "wsinfer", images, **flags)
    expected = 1 / (1 + np.exp(-logits(network, wsinfers(images))))
    require_equal(found.probability_malignant[:, None], expected)


def test_timm_keeps_several_malignant_classes(tmp_path, images):
    """timm's ResNets have torchvision's names; its transform changes no tile of the input's size."""
    network, side = classifier(3, batch(images)), 48
    content = TIMM | {"architecture": "resnet18"}
    content["pretrained_cfg"] = TIMM["pretrained_cfg"] | {"input_size": [3, side, side]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    flags = {"publisher_config": str(tmp_path / "config.json"), "malignant": ("a", "c"), "mpp": 0.5}
    flags["weights"] = stored(tmp_path, network.state_dict())
    model, found = imported(tmp_path, "timm", images, **flags)
    expected = softmax(logits(network, batch(images)))
    require_equal(found.probability, expected)
    np.testing.assert_allclose(
        found.probability_malignant, expected[:, 0] + expected[:, 2], rtol=0, atol=1e-5
    )
    assert "its publisher uses bicubic" in model.card.warnings[1]


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_other_networks_of_timm(tmp_path, images, name):
    timm = pytest.importorskip("timm", reason="needs the extra `timm`")
    fixed = {"img_size": 48} if name == "test_vit" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model(name, num_classes=3, **fixed)
        answering(network, network.get_classifier(), batch(images))
    content = TIMM | {"architecture": name}
    content["pretrained_cfg"] = TIMM["pretrained_cfg"] | {"input_size": [3, 48, 48]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    flags = {"publisher_config": str(tmp_path / "config.json"), "malignant": ("b",)}
    flags["weights"] = stored(tmp_path, network.state_dict())
    model, found = imported(tmp_path, "timm", images, **flags)
    require_equal(found.probability, softmax(logits(network, batch(images))))
    assert (model.card.architecture, model.card.mpp) == (f"timm:{name}", ())


TORCHVISION = {
    "classes": ("tumor", "normal"),
    "malignant": ("tumor",),
    "input_px": 32,
    "tile_px": 48,
    "mpp": 0.5,
}
TORCHVISIONS = transforms.Compose(
    [
        *(transforms.Resize(32), transforms.ToTensor()),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, images):
    """A checkpoint of a training of torchvision by several GPUs, and its network; the tumour is class 0."""
    network = classifier(2, batch(images, TORCHVISIONS))
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    return network, stored(tmp_path_factory.mktemp("checkpoint"), {"epoch": 3, "state_dict": state})


def test_torchvision(tmp_path, images, checkpoint):
    network, file = checkpoint
    _, found = imported(tmp_path, "torchvision:resnet18", images, weights=file, **TORCHVISION)
    require_equal(found.probability[:, ::-1], softmax(logits(network, batch(images, TORCHVISIONS))))


STATED = {
    "license": "CC-BY-4.0",
    "citation": "Someone et al. 2024",
    "trained_on": "slides of a hospital",
    "stated": ("AUC=0.96 (0.95 to 0.97)", "sensitivity = 0.8"),
    "stated_on": "the test part of a challenge",
}


def test_numbers_of_the_publisher_are_marked_until_others_are_measured(tmp_path, checkpoint, capsys):
    uri, (_, file) = str(tmp_path / "bundle"), checkpoint
    identity = importer.run(
        ImportConfig(published="torchvision:resnet18", weights=file, output=uri, **TORCHVISION, **STATED)
    )
    said = capsys.readouterr().out
    assert "licence: CC-BY-4.0; to cite: Someone et al. 2024" in said
    card, readme = bundle.read_card(uri), (tmp_path / "bundle/README.md").read_text()
    assert card.published.stated == (("AUC", "0.96 (0.95 to 0.97)"), ("sensitivity", "0.8"))
    for words in (
        "| stated by the publisher, not measured here, on the test part of a challenge | value |",
        "| AUC | 0.96 (0.95 to 0.97) |",
        "| licence of the weights | CC-BY-4.0 |",
        "| trained on | slides of a hospital |",
        "Not evaluated here yet: `jobs/evaluate.py` on your own data writes the numbers here.",
    ):
        assert words in readme, words
    assert card.metrics == {}
    origin = json.loads((tmp_path / "bundle/provenance.json").read_text())["predicate"]["buildDefinition"]
    assert origin["buildType"] == "urn:bcd:import:1"
    assert card.published.file_sha256 in str(origin["resolvedDependencies"])
    measured = {"summary": [["AUC", "0.71", "0.60 to 0.80"]], "n_images": 9, "n_patients": 3, "data": "mine"}
    bundle.write_card(card.model_copy(update={"metrics": measured}), uri)
    readme = (tmp_path / "bundle/README.md").read_text()
    assert "0.96" not in readme
    assert "| AUC | 0.71 | 0.60 to 0.80 |" in readme
    assert "On images of its user: `mine`. Whether it was trained on any of them" in readme
    assert "On 9 images of 3 patients." in readme
    assert model_id(bundle.read_card(uri)) == identity
    others = card.model_copy(update={"published": card.published.model_copy(update={"license": "CC0"})})
    assert model_id(others) == identity


def test_a_torchscript_program_is_not_run(tmp_path, zoo):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model/code/network.py", "raise SystemExit")
        archive.writestr("model/constants.pkl", b"\x80\x02].")
    (tmp_path / "torchscript_model.pt").write_bytes(buffer.getvalue())
    flags = zoo() | {"weights": str(tmp_path / "torchscript_model.pt"), "output": str(tmp_path / "bundle")}
    with pytest.raises(
        BundleError, match=r"a TorchScript program, which is code and is not run.*safetensors"
    ):
        importer.run(ImportConfig(published="wsinfer", **flags))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"classes": ("tumor", "a", "b")},
            r"fc.weight of the last layer: shape \(2, 512\); expected \(3, 512\)",
        ),
        (
            {"published": "torchvision:resnet34"},
            r"not the weights of a ResNet34: layer1.2.conv1.weight is miss",
        ),
        (
            {"published": "torchvision:resnet50"},
            r"not the weights of a ResNet50: layer1.0.conv1.weight has shape",
        ),
        ({"mean": (0, 0, 2.0)}, r"no model card can be written: mean.2"),
        ({"license": "x" * 501}, r"no model card can be written: published.license"),
    ],
)
def test_what_makes_no_bundle_is_rejected(tmp_path, checkpoint, changes, said):
    flags = {"published": "torchvision:resnet18", "weights": checkpoint[1]} | TORCHVISION | changes
    with pytest.raises(BundleError, match=said):
        importer.run(ImportConfig(output=str(tmp_path / "bundle"), **flags))
    assert not (tmp_path / "bundle").exists()


def test_a_folder_with_files_is_kept_as_it_is(tmp_path, checkpoint):
    (tmp_path / "notes.txt").write_text("mine")
    flags = {"published": "torchvision:resnet18", "weights": checkpoint[1], "output": str(tmp_path)}
    with pytest.raises(ConfigError, match="is not empty: choose another"):
        importer.run(ImportConfig(**flags, **TORCHVISION))
    with pytest.raises(ConfigError, match="--stated AUC: expected NAME=VALUE"):
        importer.run(ImportConfig(**flags | {"output": str(tmp_path / "b")}, **TORCHVISION, stated=("AUC",)))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
