import sys

import pytest
import yaml

from bcd import storage
from bcd.config.signing import PushConfig, SignConfig
from bcd.errors import BundleError, ConfigError, StorageError
from bcd.model import bundle, predictor
from bcd.model.published import push
from bcd.preflight import signing
from tests.hub import TOKEN
from tests.model.test_bundle import card, untrained
from tests.pictures import encode, gradient
from tests.preflight.test_signing import small_bundle, write_key

TARGET = "hf://owner/model"
# huggingface_hub 2.4 uploads large files with an argument that its HTTP client no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def library():
    return pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")


@pytest.fixture
def writer(library, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def pushed(uri, **settings):
    return push.run(PushConfig(bundle=str(uri), target=TARGET, **settings))


def files(hub):
    return hub.repositories["models/owner/model"].files("main")


def test_a_bundle_from_the_hub_predicts_as_the_one_that_was_pushed(writer, tmp_path):
    identity = predictor.save(untrained(), card(), str(tmp_path))
    uri = pushed(tmp_path)
    assert uri == f"{TARGET}@{list(writer.repositories['models/owner/model'].commits)[-1]}"
    assert files(writer) == {".gitattributes": b"*.bin filter=lfs"} | {
        path.name: path.read_bytes() for path in tmp_path.iterdir()
    }
    assert writer.repositories["models/owner/model"].private
    loaded, local = predictor.load(uri), predictor.load(str(tmp_path))
    assert loaded.model_id == identity
    content = [encode(gradient())]
    assert loaded.predict_files(content).logit.tolist() == local.predict_files(content).logit.tolist()


def test_a_signature_is_valid_on_the_hub_and_replaced_with_its_bundle(writer, tmp_path):
    pytest.importorskip("model_signing.signing", reason="pip install model-signing pyopenssl")
    write_key(tmp_path / "key.pem")
    uri = small_bundle(str(tmp_path / "model"), bundle_license="apache-2.0")
    signing.run(SignConfig(bundle=uri, key=str(tmp_path / "key.pem")))
    first = pushed(uri)
    digest = signing.verify(first, str(tmp_path / "key.pub"))
    assert bundle.identify(first, digest) == bundle.identify(uri)
    small_bundle(uri, b"others")
    second = pushed(uri)
    assert not bundle.is_signed(second)
    assert bundle.is_signed(first)
    with pytest.raises(BundleError, match="has no signature"):
        signing.verify(second, str(tmp_path / "key.pub"))


def test_a_licence_is_stated_before_the_bundle_is_signed(writer, tmp_path):
    uri = small_bundle(str(tmp_path))
    identity = bundle.identify(uri)
    pushed(uri, license="cc-by-4.0")
    assert yaml.safe_load(files(writer)["README.md"].split(b"---\n")[1])["license"] == "cc-by-4.0"
    assert bundle.identify(uri) == identity
    assert bundle.read_card(uri).bundle_license == "cc-by-4.0"
    (tmp_path / "model.sig").write_bytes(b"{}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    pushed(uri, license="cc-by-4.0")
    with pytest.raises(BundleError, match=r"its signature covers the licence: delete model.sig there"):
        pushed(uri, license="apache-2.0")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_of_others_in_the_repository_stay(writer, tmp_path):
    writer.put("owner/model", {"LICENSE": b"text", "model.sig": b"old"})
    pushed(small_bundle(str(tmp_path)), public=True)
    assert files(writer)["LICENSE"] == b"text"
    assert "model.sig" not in files(writer)
    assert not writer.repositories["models/owner/model"].private


def test_a_damaged_bundle_is_not_pushed(writer, tmp_path):
    small_bundle(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(BundleError, match="its SHA-256 differs"):
        pushed(tmp_path)
    assert writer.repositories == {}


def test_what_the_hub_refuses_is_a_sentence(library, hub, tmp_path, monkeypatch):
    uri = small_bundle(str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(StorageError, match=r"hf://owner/model: cannot push: .*set HF_TOKEN to a token"):
        pushed(uri)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(StorageError, match=r"cannot push: Invalid metadata in README.md"):
        pushed(uri, license="surely-free")
    assert list(files(hub)) == [".gitattributes"]


@pytest.mark.parametrize(
    "target", ["owner/model", "hf://model", "hf://datasets/owner/model", "s3://bucket/model"]
)
def test_the_target_is_a_repository_of_models(library, tmp_path, target):
    with pytest.raises(ConfigError, match="expected hf://OWNER/NAME or hf://OWNER/NAME@BRANCH"):
        push.run(PushConfig(bundle=str(tmp_path), target=target))


def test_the_package_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"not installed .*; run: pip install huggingface_hub"):
        pushed(tmp_path)


def test_a_bundle_of_the_hub_is_pinned_before_it_is_pushed_on(writer, tmp_path):
    first = pushed(small_bundle(str(tmp_path)), license="apache-2.0")
    assert storage.pinned(TARGET) == first
    again = push.run(PushConfig(bundle=TARGET, target="hf://owner/copy"))
    assert bundle.identify(again) == bundle.identify(first)
    with pytest.raises(StorageError, match="outputs are on a local path"):
        push.run(PushConfig(bundle=first, target="hf://owner/copy", license="cc0-1.0"))
