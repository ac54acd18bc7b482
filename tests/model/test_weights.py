"""Weights in the forms that people have, and what is no ResNet50: names and numbers of every tensor."""

import io
import os
import pickle
import re
import zipfile

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from bcd.errors import BundleError, StorageError
from bcd.model import weights

TRUNK = "layer1.0.conv1.weight"


def constant(value, shape, dtype=torch.float32):
    """A tensor of one number, which takes no place in a file."""
    return torch.full((), value, dtype=dtype).expand(shape)


def network(heads=1000):
    """A state dict in which every tensor has a number of its own."""
    names = weights.skeleton(heads).state_dict().items()
    return {name: constant(i, own.shape, own.dtype) for i, (name, own) in enumerate(names)}


def below(prefix, state=None):
    return {f"{prefix}{name}": tensor for name, tensor in (state or network()).items()}


def huggingface(prefix="resnet."):
    """The same tensors as HuggingFace's ResNetForImageClassification names them."""
    named = {}
    for name, tensor in network().items():
        name = re.sub(r"^fc\.", "classifier.1.", name)
        name = re.sub(r"^conv1\.", f"{prefix}embedder.embedder.convolution.", name)
        name = re.sub(r"^bn1\.", f"{prefix}embedder.embedder.normalization.", name)
        if block := re.fullmatch(r"layer(\d)\.(\d)\.(\w+?)(\d)?\.(?:(\d)\.)?(\w+)", name):
            stage, place, kind, number, half, rest = block.groups()
            norm = half == "1" if kind == "downsample" else kind == "bn"
            part = "shortcut" if kind == "downsample" else f"layer.{int(number) - 1}"
            name = f"{prefix}encoder.stages.{int(stage) - 1}.layers.{place}.{part}"
            name += f".{'normalization' if norm else 'convolution'}.{rest}"
        named[name] = tensor
    return named


def tiatoolbox():
    """The same tensors as TIAToolbox's CNNModel names them, and a last layer of nine classes."""
    order = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    named = {"classifier.weight": constant(1, (9, 2048)), "classifier.bias": constant(2, (9,))}
    for name, tensor in network().items():
        module, _, rest = name.partition(".")
        if module != "fc":
            named[f"feat_extract.{order.index(module)}.{rest}"] = tensor
    return named


def test_huggingfaces_names_are_those_of_the_published_model():
    names = huggingface().keys()
    for name in (
        "resnet.embedder.embedder.convolution.weight",
        "resnet.encoder.stages.0.layers.0.shortcut.convolution.weight",
        "resnet.encoder.stages.3.layers.2.layer.2.normalization.running_var",
        "classifier.1.bias",
    ):
        assert name in names


def moco(lead, follow):
    left_out = {"module.queue": torch.zeros(2, 2), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    trunk = {name: tensor for name, tensor in network().items() if not name.startswith("fc.")}
    head = {f"module.{lead}.fc.0.weight": constant(1, (2048, 2048))}
    return {"epoch": 1, "arch": "resnet50", "optimizer": {"state": {}}} | {
        "state_dict": below(f"module.{lead}.", trunk) | below(f"module.{follow}.", trunk) | left_out | head
    }


FORMS = {
    "timm or torchvision": (network(), ""),
    "half precision": ({name: t.half() if t.is_floating_point() else t for name, t in network().items()}, ""),
    "no counters": ({n: t for n, t in network().items() if "num_batches" not in n}, ""),
    "a trunk, as Lunit's": ({n: t for n, t in network().items() if not n.startswith("fc.")}, ""),
    "a timm training": ({"epoch": 3, "arch": "resnet50", "state_dict": network()}, "took 'state_dict' out"),
    "DataParallel": (below("module."), "removed the prefix 'module.'"),
    "torch.compile": (below("_orig_mod."), "removed the prefix '_orig_mod.'"),
    "both": (
        {"model": below("module._orig_mod.")},
        "took 'model' out of the file, removed the prefix 'module._",
    ),
    "Lightning": (
        {"pytorch-lightning_version": "2", "state_dict": below("model.") | {"loss.weight": torch.ones(2)}},
        "took 'state_dict' out of the file, removed the prefix 'model.', left out loss.weight",
    ),
    "MoCo": (
        moco("encoder_q", "encoder_k"),
        "removed the prefix 'module.encoder_q.', left out module.encoder_k.",
    ),
    "MoCo v3": (moco("base_encoder", "momentum_encoder"), "removed the prefix 'module.base_encoder.'"),
    "HuggingFace": (
        huggingface(),
        "removed the prefix 'resnet.', renamed from HuggingFace's names, left out clas",
    ),
    "TIAToolbox": (tiatoolbox(), "renamed from TIAToolbox's names"),
    "HuggingFace's backbone": (
        {n: t for n, t in huggingface("").items() if "classifier" not in n},
        "renamed from HuggingFace's names",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_trunk_and_says_what_was_done(tmp_path, capsys, form):
    content, said = FORMS[form]
    torch.save(content, tmp_path / "w.pth")
    found = weights.pretrained(str(tmp_path / "w.pth"))
    told = capsys.readouterr().out
    assert said in told
    assert bool(said) == bool(told)
    own = weights.skeleton(2).state_dict()
    fitted = weights.fitting(own, found)
    for name, tensor in network().items():
        if not name.startswith("fc.") and not (form == "no counters" and "num_batches" in name):
            assert torch.equal(fitted[name], tensor), name
    assert fitted["conv1.weight"].dtype == torch.float32
    assert fitted["fc.weight"].is_meta  # our own


def test_a_head_is_kept_whole_or_not_at_all():
    own, given = weights.skeleton(2).state_dict(), network(2)
    assert torch.equal(weights.fitting(own, given)["fc.weight"], given["fc.weight"])
    del given["fc.bias"]
    assert weights.fitting(own, given)["fc.weight"].is_meta


def changed(**tensors):
    return network() | {name.replace("_dot_", "."): tensor for name, tensor in tensors.items()}


NAN, INFINITE = constant(float("nan"), (64,)), constant(float("inf"), (64,))
with pytest.warns(UserWarning, match="quantize"):
    QUANTISED = torch.quantize_per_tensor(torch.ones(64, 3, 7, 7), 0.1, 0, torch.qint8)
FOREIGN = {
    "ResNet101": (
        changed(layer3_dot_6_dot_conv1_dot_weight=torch.ones(1)),
        "layer3.6.conv1.weight is no part of it",
    ),
    "SE-ResNet": (
        changed(layer1_dot_0_dot_se_dot_fc1_dot_weight=torch.ones(1)),
        "layer1.0.se.fc1.weight is no part",
    ),
    "another stem": (changed(conv2_dot_weight=torch.ones(1)), "conv2.weight is no part of it"),
    "pooling": (changed(attnpool_dot_weight=torch.ones(1)), "attnpool.weight is no part of it"),
    "NaN": (changed(bn1_dot_weight=NAN), "bn1.weight has NaN or infinite values"),
    "infinite": (changed(bn1_dot_bias=INFINITE), "bn1.bias has NaN or infinite values"),
    "too large": (
        changed(bn1_dot_bias=constant(1e300, (64,), torch.float64)),
        "bn1.bias has NaN or infinite",
    ),
    "negative": (changed(bn1_dot_running_var=constant(-1, (64,))), "bn1.running_var has negative variances"),
    "integers": (
        changed(bn1_dot_weight=constant(1, (64,), torch.int32)),
        "bn1.weight is torch.int32, torch.strided",
    ),
    "complex": (changed(bn1_dot_weight=constant(1, (64,), torch.complex64)), "bn1.weight is torch.complex64"),
    "quantised": (changed(conv1_dot_weight=QUANTISED), "conv1.weight is torch.qint8"),
    "sparse": (
        changed(conv1_dot_weight=torch.ones(64, 3, 7, 7).to_sparse()),
        "is torch.float32, torch.sparse_coo",
    ),
    "empty": (
        changed(conv1_dot_weight=torch.zeros(0)),
        r"conv1.weight has shape (0,), expected (64, 3, 7, 7)",
    ),
    "no data": (changed(bn1_dot_weight=torch.ones(64, device="meta")), "bn1.weight is a name without data"),
    "missing": (
        {n: t for n, t in network().items() if n != TRUNK},
        f"{TRUNK} is missing, expected (64, 64, 1, 1)",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_a_resnet50_does_not_have_is_named(tmp_path, kind):
    state, said = FOREIGN[kind]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(BundleError, match=rf"w\.pth: not the weights of a ResNet50: .*{re.escape(said)}"):
        weights.pretrained(str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"bn1.weight": constant(1, (64,), torch.float16)},
            r"bn1.weight is torch.float16.*, expected torch.float32",
        ),
        ({"fc.weight": constant(1, (3, 2048))}, r"fc.weight has shape \(3, 2048\), expected \(2, 2048\)"),
        ({"head.weight": constant(1, (2,))}, "head.weight is no part of it"),
        ({"bn1.num_batches_tracked": constant(1, ())}, "bn1.num_batches_tracked is torch.float32"),
        ({"bn1.weight": NAN}, "bn1.weight has NaN or infinite values"),
    ],
)
def test_in_a_bundle_everything_has_to_fit(change, said):
    own = weights.skeleton(2).state_dict()
    assert weights.fitting(own, network(2), whole=True).keys() == own.keys()
    with pytest.raises(BundleError, match=f"not the weights of a ResNet50: {said}"):
        weights.fitting(own, network(2) | change, whole=True)


def test_the_first_three_faults_are_shown():
    state = {name: tensor for name, tensor in network().items() if not name.startswith("layer4")}
    with pytest.raises(BundleError, match=r"layer4\.0.*; layer4\.0.*; layer4\.0.*; and \d+ more$"):
        weights.fitting(weights.skeleton(2).state_dict(), state)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "a mapping of nothing"),
        ({"epoch": 3, "args": {"lr": 1}}, r"a mapping of epoch \(int\), args \(dict\)"),
        ([1], "an object of type list"),
        (torch.ones(2), "an object of type Tensor"),
        ({"deep": {"state_dict": network()}}, r"a mapping of deep \(dict\)"),
        ({"teacher": network(), "student": network()}, "several networks: teacher, student; save one"),
        (below("a.") | below("b."), r"several networks: a\., b\.; save one"),
    ],
)
def test_what_is_no_state_dict_is_described(tmp_path, found, said):
    torch.save(found, tmp_path / "w.pth")
    with pytest.raises(BundleError, match=said):
        weights.pretrained(str(tmp_path / "w.pth"))


def zipped(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/bcd-evil",)


def saved(found, **options):
    buffer = io.BytesIO()
    torch.save(found, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (
            pickle.dumps(Evil(), protocol=2),
            r"pickled Python objects \(posix.mkdir\); save `network.state_dict\(\)`",
        ),
        (saved({"a": Evil()}), r"pickled Python objects \(posix.mkdir\)"),
        (saved({"a": torch.ones(9)})[:-200], "a damaged PyTorch file of"),
        (b"\x10\0\0\0\0\0\0\0{garbage........", "a damaged safetensors file of 24 bytes"),
        (b"\x00garbage" * 9, r"72 bytes of another format, which begin with b'\\x00garbage'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><HTML>", "a web page"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (zipped("w/code/a.py", "w/constants.pkl"), "a TorchScript program"),
        (zipped("a.npy", "b.npy"), r"a ZIP archive of a.npy, b.npy"),
    ],
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_of_another_kind_is_described_and_nothing_in_it_runs(tmp_path, content, said, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name}: not a state dict, but {said}") as raised:
        weights.pretrained(str(tmp_path / name))
    assert "weights_only" not in str(raised.value)
    assert not os.path.exists("/tmp/bcd-evil")


LEGACY = saved(network(), _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "content",
    [
        LEGACY[:-3],
        LEGACY[: len(LEGACY) // 2],
        LEGACY[:600],
        LEGACY.replace(b"cpuq", b"cpux", 1),
        saved(network()).replace(b"data/12", b"data/1\xb7"),
        saved(network()).replace(b"data/12", b"da\xf4a/12"),
    ],
)
def test_damage_that_a_fuzz_found_is_rejected(tmp_path, content):
    """A cut in the middle of a number (struct.error), names in no UTF-8, a storage that is not there."""
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(BundleError, match=r"w.pth: not "):
        weights.pretrained(str(tmp_path / "w.pth"))


def test_a_file_is_known_by_its_content(tmp_path):
    state = {"bn1.weight": torch.arange(3.0)}
    save_file(state, tmp_path / "w.pth")
    torch.save(state, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        assert torch.equal(
            weights.read_weights((tmp_path / name).read_bytes(), name)["bn1.weight"], torch.arange(3.0)
        )


def test_none_is_no_weights_and_missing_ones_are_named(tmp_path):
    assert weights.pretrained("none") is None
    with pytest.raises(StorageError, match=r"no.safetensors: cannot read it"):
        weights.pretrained(str(tmp_path / "no.safetensors"))


def test_a_failed_download_says_what_to_do(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", fail)
    with pytest.raises(BundleError, match=r"--weights imagenet.*no route to host.*--weights none"):
        weights.pretrained("imagenet")


@pytest.mark.real
def test_the_real_weights_fit(real_data):
    given = weights.pretrained(str(real_data / "weights/resnet50_imagenet.safetensors"))
    network = weights.build(2, given).eval()
    stored = load_file(real_data / "weights/resnet50_imagenet.safetensors")
    torch.testing.assert_close(network.conv1.weight, stored["conv1.weight"].float())
