import hashlib
import json
import re
from functools import partial

import markdown
import numpy as np
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from safetensors.torch import save

from bcd import provenance
from bcd.config.training import TrainConfig
from bcd.errors import BundleError
from bcd.model import bundle, novelty, predictor, resnet, weights
from bcd.model.card import Card, dump, model_id


def untrained(std=1e-3, seed=1, architecture="resnet18"):
    """A network whose last layer is small and always the same.

    The features of an untrained network are large: without this all probabilities are 0 or 1.
    """
    network = weights.build(2, seed=seed, architecture=architecture)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(network.fc.weight, std=std, generator=generator)
    return network


def card(**changes):
    config = TrainConfig(data="d", weights="none", input_height_px=64, input_width_px=96)
    facts = {
        "architecture": "resnet18",
        "target": "tumor_class",
        "classes": ("benign", "malignant"),
        "input_height_px": 64,
        "input_width_px": 96,
        "field_height_px": 460,
        "field_width_px": 700,
        "mpp": (0.49,),
        "magnifications": (40,),
        "protocol": "case",
        "seed": 0,
        "data_fingerprint": "d" * 64,
        "split_fingerprint": "5" * 64,
        "leaky": False,
        "synthetic": False,
        "training": config.model_dump(mode="json"),
        "validation": {"epoch": 3},
        "versions": provenance.versions(),
        "git_commit": None,
    }
    return Card(**facts | changes)


def written(known):
    """What a card gets when the bundle is written."""
    return {"weights_sha256": known.weights_sha256, "canary_logit": known.canary_logit}


@pytest.fixture(scope="module")
def network():
    return weights.build(2, seed=1, architecture="resnet18").eval()


def ready(network, **changes):
    """A predictor without files."""
    features = partial(resnet.features, network)
    return predictor.Predictor(card(**changes), "id", network, features, torch.device("cpu"), "float32")


def test_the_readme_says_what_must_be_said(tmp_path, network):
    predictor.save(network, card(leaky=True, synthetic=True, protocol="image"), str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    for words in ("Research use only", "Synthetic", "Leaky split", "benign, malignant", "40X", "0.49 µm/px"):
        assert words in text


@pytest.mark.parametrize("few", [None, "2 benign and 9 malignant patients are too few"])
def test_the_readme_says_where_patients_are_too_few(few):
    metrics = {"summary": [["AUC", "1.000", "–"]], "n_images": 1, "n_patients": 1, "too_few_patients": few}
    text = bundle._readme(card(metrics=metrics))
    assert ("**Too few patients.** 2 benign and 9" in text) == bool(few)
    assert "On 1 image of 1 patient that it was not trained on" in text


def front_matter(known):
    opening, front, page = bundle._readme(known).split("---\n", 2)
    assert (opening, page.lstrip()[:8]) == ("", "# Model ")
    return yaml.safe_load(front)


def measured(**changes):
    row = {"n_patients": 4, "auc": 0.91234, "accuracy": None, "specificity": 0.5}
    intervals = {"auc": [0.8, 0.98765], "accuracy": None, "specificity": None}
    pooled = row | {"intervals": intervals}
    return {"summary": [], "n_images": 9, "n_patients": 4, "pooled": pooled} | changes


def test_the_readme_has_what_the_hub_reads():
    known = card(metrics=measured(), bundle_license="apache-2.0")
    found = front_matter(known)
    assert (found["license"], found["library_name"]) == ("apache-2.0", "bcd")
    (result,) = found["model-index"][0]["results"]
    assert result["dataset"] == {"type": "test-part", "name": "test part, 9 images of 4 patients"}
    assert result["metrics"] == [
        {
            "type": "auc",
            "value": 0.9123,
            "name": "auc, 95 % interval over patients 0.8 to 0.9877",
            "args": {"interval": [0.8, 0.9877]},
        },
        {"type": "specificity", "value": 0.5, "name": "specificity"},
    ]
    assert "Licence of this bundle: apache-2.0" in bundle._readme(known)
    assert "license" not in front_matter(card())


@pytest.mark.parametrize("flaw", ["leaky", "synthetic", None])
def test_numbers_that_are_not_comparable_are_not_in_the_index(flaw):
    changes = {flaw: True} if flaw else {"metrics": {}}
    assert "model-index" not in front_matter(card(**{"metrics": measured()} | changes))


def test_the_library_of_the_hub_reads_the_front_matter(tmp_path):
    library = pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")
    (tmp_path / "README.md").write_text(bundle._readme(card(metrics=measured())), encoding="utf-8")
    found = library.ModelCard.load(tmp_path / "README.md").data
    facts = found.to_dict()
    assert (facts["library_name"], facts["pipeline_tag"]) == ("bcd", "image-classification")
    assert [(each.metric_type, each.metric_value) for each in found.eval_results] == [
        ("auc", 0.9123),
        ("specificity", 0.5),
    ]
    assert found.eval_results[0].metric_args == {"interval": [0.8, 0.9877]}


INJECTIONS = (
    *("<img src=x onerror=alert(1)>", "[see](https://e.example)", "![](https://e.example/x.png)", "a | b"),
    *("a\n\n# b\n\n| c | d |\n|---|---|\n| e | f |", "` <b>x</b> `", "<https://e.example>", "- [x](y)"),
)


def elements(text):
    """The elements of a README as two renderers see it; their text and the number of items left out."""
    pages = (
        markdown.markdown(text, extensions=["tables"]),
        MarkdownIt("commonmark").enable("table").render(text),
    )
    return [re.findall(r"<(?!/?li)[^>]*>", page) for page in pages]


@pytest.mark.parametrize("place", ["warnings", "data", "versions", "table", "front matter"])
def test_names_add_no_markup_to_the_readme(place):
    def readme(name):
        changes = {
            "warnings": {"warnings": (name,)},
            "data": {"training": card().training | {"data": name}},
            "versions": {"versions": {name: name}},
            "table": {"metrics": {"summary": [[name, name, name]], "n_images": 1, "n_patients": 1}},
            "front matter": {"metrics": measured(), "training": card().training | {"name": name}},
        }
        return bundle._readme(card(**changes[place]))

    plain = elements(readme("a name"))
    offenders = [name for name in INJECTIONS if elements(readme(name)) != plain]
    assert offenders == []


def test_a_bundle_states_its_origin(tmp_path, network):
    predictor.save(network, card(git_commit="0123456789ab"), str(tmp_path))
    known = bundle.read_card(str(tmp_path))
    origin = json.loads((tmp_path / "provenance.json").read_bytes())
    assert origin["subject"] == [{"name": "model.safetensors", "digest": {"sha256": known.weights_sha256}}]
    build = origin["predicate"]["buildDefinition"]
    assert build["externalParameters"]["settings"] == known.training
    assert build["resolvedDependencies"][0]["annotations"]["data_fingerprint"] == known.data_fingerprint
    assert build["resolvedDependencies"][1]["annotations"]["git_commit"] == "0123456789ab"
    materials = json.loads((tmp_path / "sbom.cdx.json").read_bytes())
    assert materials["metadata"]["component"]["hashes"][0]["content"] == known.weights_sha256


def test_a_bundle_without_documents_of_its_origin_is_loaded(tmp_path, network):
    """As version 0.2.0 wrote them."""
    written = predictor.save(network, card(), str(tmp_path))
    (tmp_path / "sbom.cdx.json").unlink()
    (tmp_path / "provenance.json").unlink()
    assert predictor.load(str(tmp_path)).model_id == written


def test_another_card_than_the_verified_one_is_rejected(tmp_path, network):
    """Also one with the same `model_id`, which leaves metrics out."""
    uri = str(tmp_path)
    identity = predictor.save(network, card(), uri)
    verified = hashlib.sha256((tmp_path / "card.json").read_bytes()).hexdigest()
    assert predictor.load(uri, card_sha256=verified).model_id == identity
    metrics = {"summary": [], "n_images": 1, "n_patients": None}
    bundle.write_card(bundle.read_card(uri).model_copy(update={"metrics": metrics}), uri)
    assert bundle.identify(uri) == identity
    for use in (
        predictor.load,
        bundle.read_card,
        bundle.identify,
        partial(bundle.read_same, identity=identity),
    ):
        with pytest.raises(BundleError, match=r"card.json is no longer the one whose signature was verified"):
            use(uri, card_sha256=verified)


def test_a_new_bundle_has_no_signature_of_another(tmp_path, network):
    predictor.save(network, card(), str(tmp_path))
    (tmp_path / "model.sig").write_bytes(b"signature")
    bundle.write_card(bundle.read_card(str(tmp_path)), str(tmp_path))
    assert bundle.is_signed(str(tmp_path))
    predictor.save(network, card(), str(tmp_path))
    assert not bundle.is_signed(str(tmp_path))


def test_no_card_no_bundle(tmp_path, network):
    with pytest.raises(BundleError, match=r"no model bundle there; expected card.json"):
        predictor.load(str(tmp_path))
    predictor.save(network, card(), str(tmp_path))
    (tmp_path / "card.json").unlink()
    assert not bundle.is_complete(str(tmp_path))


def sealed(folder, content):
    """A bundle that is as it was written, whatever it holds."""
    known = {"weights_sha256": hashlib.sha256(content).hexdigest(), "canary_logit": (0.0, 0.0)}
    (folder / "model.safetensors").write_bytes(content)
    (folder / "card.json").write_bytes(dump(card(**known)))
    return str(folder)


def test_weights_that_are_not_the_cards_are_rejected(tmp_path):
    content = save({"a": torch.zeros(9)})
    uri = sealed(tmp_path, content)
    for damaged in (content[:-1] + b"x", content[:-1], content + b"x", b""):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        for use in (predictor.load, bundle.identify):
            with pytest.raises(BundleError, match=r"is not the file that card.json was written for"):
                use(uri)


def test_weights_that_are_no_network_are_rejected(tmp_path):
    uri = sealed(tmp_path, save({"a": torch.zeros(9)}))
    with pytest.raises(BundleError, match=r": not the weights of a ResNet18: conv1.weight is missing"):
        predictor.load(uri)
    with pytest.raises(BundleError, match=r"model.safetensors: not a state dict, but an empty file"):
        predictor.load(sealed(tmp_path, b""))


def test_a_bundle_that_changed_is_reported(tmp_path, network):
    uri = str(tmp_path)
    began = predictor.save(network, card(), uri)
    assert bundle.read_same(uri, began) == bundle.read_card(uri)
    bundle.write_card(
        bundle.read_card(uri).model_copy(
            update={"metrics": {"summary": [], "n_images": 1, "n_patients": None}}
        ),
        uri,
    )
    assert bundle.identify(uri) == began
    now = predictor.save(network, card(threshold=0.4), uri)
    with pytest.raises(
        BundleError, match=f"has changed since the start: the model was {began}, now it is {now}"
    ):
        bundle.read_same(uri, began)


def statistics(network, cutoff=1.0):
    """Such that the pooled features of a black image are the mean."""
    black = ready(network).pooled(np.zeros((1, 64, 96, 3), np.uint8))[0][0]
    facts = {"mean": tuple(black.tolist()), "spread": (0.5,) * len(black), "cutoff": cutoff}
    return novelty.FeatureStatistics(**facts, n_training=1, n_validation=1)


def test_statistics_in_the_card_decide_its_identity(tmp_path, network):
    known = card(feature_statistics=statistics(network))
    predictor.save(network, known, str(tmp_path))
    read = bundle.read_card(str(tmp_path))
    assert read == known.model_copy(update=written(read))
    assert model_id(known) != model_id(card())
