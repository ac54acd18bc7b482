import hashlib
import json
import shutil
import sys
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bcd import storage
from bcd.config.evaluation import EvaluateConfig
from bcd.config.scoring import ScoreConfig
from bcd.config.serving import ServiceConfig
from bcd.config.signing import SignConfig, VerifyConfig
from bcd.errors import BundleError, ConfigError, MissingError
from bcd.evaluation import evaluate
from bcd.model import bundle
from bcd.preflight import signing
from bcd.runtime import predict
from bcd.scoring import score
from bcd.serving import serve
from tests.model.test_bundle import card

PEM = serialization.Encoding.PEM
# Allowed uses of a certificate: of a root, of a signer, and of something else.
ROOT, SIGNER, NEITHER = "key_cert_sign", "digital_signature", "key_agreement"


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("model_signing.signing", reason="pip install model-signing pyopenssl")


def write_key(path, password=None):
    """A private key, and its public half beside it as .pub."""
    key = ec.generate_private_key(ec.SECP256R1())
    cipher = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    path.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, cipher))
    public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return key


def certificate(key, subject, issuer_key, issuer, use):
    """A certificate of a key, valid for a day."""
    uses = dict.fromkeys(
        [ROOT, SIGNER, NEITHER, "content_commitment", "key_encipherment", "data_encipherment", "crl_sign"],
        False,
    )
    uses |= {"encipher_only": False, "decipher_only": False, use: True}
    now = datetime.now(UTC)
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in (subject, issuer)]
    builder = x509.CertificateBuilder(*names[::-1], key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
    builder = builder.add_extension(x509.BasicConstraints(use == ROOT, None), critical=True)
    builder = builder.add_extension(x509.KeyUsage(**uses), critical=True)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(PEM)


@pytest.fixture(scope="module")
def keys(tmp_path_factory, library):
    """Two keys, one of them with a certificate from a root by way of another one, and a second root."""
    folder = tmp_path_factory.mktemp("keys")
    ours, other, middle, root = (write_key(folder / f"{n}.pem") for n in ("ours", "other", "middle", "root"))
    issued = certificate(middle, "middle", root, "root", ROOT)
    (folder / "root.crt").write_bytes(certificate(root, "root", root, "root", ROOT))
    (folder / "other.crt").write_bytes(certificate(other, "root", other, "root", ROOT))
    (folder / "chain.crt").write_bytes(certificate(ours, "ours", middle, "middle", SIGNER) + issued)
    (folder / "web.crt").write_bytes(certificate(ours, "ours", middle, "middle", NEITHER) + issued)
    return folder


def small_bundle(uri, weights=b"weights", **changes):
    """A bundle whose weights are whole, but of no network."""
    known = {"weights_sha256": hashlib.sha256(weights).hexdigest(), "canary_logit": (0.0, 0.0)}
    bundle.write_bundle(weights, card(**known, **changes), uri)
    return uri


@pytest.fixture(scope="module")
def signed_once(tmp_path_factory, keys):
    uri = small_bundle(str(tmp_path_factory.mktemp("signed") / "model"))
    signing.run(SignConfig(bundle=uri, key=str(keys / "ours.pem")))
    return uri


@pytest.fixture
def signed(signed_once, tmp_path):
    """A copy of a signed bundle."""
    shutil.copytree(signed_once, tmp_path / "copied")
    return tmp_path / "copied"


def test_a_signed_bundle_is_verified_where_it_is_copied(signed, keys, capsys):
    public = str(keys / "ours.pub")
    digest = hashlib.sha256((signed / "card.json").read_bytes()).hexdigest()
    assert signing.verify(str(signed), public) == digest
    assert signing.verified(str(signed), None) is None
    signing.run(VerifyConfig(bundle=str(signed), key=public))
    assert capsys.readouterr().out == f"{signed}: the signature is valid for {public}\n"


def test_the_signature_is_one_of_openssf(signed, keys):
    """What others have installed verifies it, too, with its own settings."""
    from model_signing import hashing, verifying

    paths = hashing.Config().set_ignored_paths(paths=[signed / "model.sig"])
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=keys / "ours.pub")
    verifier.set_hashing_config(paths).verify(signed, signed / "model.sig")


def change(path, content=b"x"):
    path.write_bytes(path.read_bytes() + content)


def swapped(folder):
    """Another whole bundle beside the signature of the first."""
    signature = (folder / "model.sig").read_bytes()
    small_bundle(str(folder), b"others", threshold=0.9)
    (folder / "model.sig").write_bytes(signature)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda folder: change(folder / "model.safetensors"),
            "model.safetensors was changed. Copy the bundle",
        ),
        (
            lambda folder: change(folder / "card.json", b" "),
            "card.json was changed. Copy the bundle again from",
        ),
        (lambda folder: change(folder / "README.md"), "README.md was changed"),
        (lambda folder: (folder / "new.txt").write_text("x"), "new.txt was added"),
        (lambda folder: (folder / "card.json").unlink(), "card.json is missing"),
        (lambda folder: (folder / "sbom.cdx.json").unlink(), "sbom.cdx.json is missing"),
        (swapped, "README.md was changed, card.json was changed, model.safetensors was changed"),
        (
            lambda folder: (folder / "model.sig").unlink(),
            "no signature, expected model.sig there. Copy all of",
        ),
        (lambda folder: change(folder / "model.sig"), "model.sig is damaged"),
        (lambda folder: (folder / "model.sig").write_bytes(b"[]"), "model.sig is damaged"),
        (lambda folder: (folder / ".hidden").write_text("x"), r"contains 1 entry \(hidden\): no signature"),
        (
            lambda folder: shutil.copytree(folder, folder / "a"),
            "contains a/README.md, a/card.json, a/model.s",
        ),
    ],
)
def test_a_bundle_that_is_not_as_it_was_signed_is_rejected(signed, keys, spoil, sentence):
    spoil(signed)
    with pytest.raises(BundleError, match=sentence):
        signing.verify(str(signed), str(keys / "ours.pub"))


def test_a_signature_for_other_content_is_rejected(signed, keys):
    """One that states what there is, but was not made for it."""
    swapped(signed)
    names = [path.name for path in signed.iterdir() if path.name != "model.sig"]
    content = json.loads((signed / "model.sig").read_bytes())
    statement = json.loads(signing.base64.b64decode(content["dsseEnvelope"]["payload"]))
    digests = {name: hashlib.sha256((signed / name).read_bytes()).hexdigest() for name in sorted(names)}
    statement["predicate"]["resources"] = [
        {"name": name, "digest": digest, "algorithm": "sha256"} for name, digest in digests.items()
    ]
    root = hashlib.sha256(b"".join(map(bytes.fromhex, digests.values()))).hexdigest()
    statement["subject"][0]["digest"]["sha256"] = root
    payload = signing.base64.b64encode(json.dumps(statement).encode()).decode()
    content["dsseEnvelope"]["payload"] = payload
    (signed / "model.sig").write_text(json.dumps(content))
    with pytest.raises(BundleError, match="it was made with another key"):
        signing.verify(str(signed), str(keys / "ours.pub"))


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        (
            "other.pub",
            "does not match the provided public key. Copy the bundle again from where it was signed",
        ),
        ("root.crt", "made with a key alone, and --key is for those made with a key and its certificate"),
        ("ours.pem", "ours.pem cannot be used: .*Expected a public key"),
    ],
)
def test_another_key_is_rejected(signed, keys, key, sentence):
    with pytest.raises(BundleError, match=sentence):
        signing.verify(str(signed), str(keys / key))


@pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated")  # in the library
def test_a_certificate_leads_to_its_root(signed, keys):
    private = str(keys / "ours.pem")
    verify = partial(signing.verify, str(signed))
    signing.sign(str(signed), private, str(keys / "chain.crt"))
    assert verify(str(keys / "root.crt"))
    for key, sentence in {
        "other.crt": "certificate",
        "ours.pub": "it was made with a key and its certificate",
    }.items():
        with pytest.raises(BundleError, match=f"signature is not valid for .*{sentence}"):
            verify(str(keys / key))
    signing.sign(str(signed), private, str(keys / "web.crt"))
    with pytest.raises(BundleError, match="Signing certificate cannot be used for signing"):
        verify(str(keys / "root.crt"))


def test_keys_that_cannot_sign_are_named(signed, keys, tmp_path, monkeypatch):
    sign = partial(signing.sign, str(signed))
    with pytest.raises(BundleError, match=r"ours.pub: .*Expected a private key"):
        sign(str(keys / "ours.pub"))
    with pytest.raises(BundleError, match="certificate does not match"):
        sign(str(keys / "other.pem"), str(keys / "chain.crt"))
    with pytest.raises(MissingError):
        sign(str(keys / "none.pem"))
    with pytest.raises(ConfigError, match="expected a file on this machine"):
        sign("s3://bucket/signing.pem")
    write_key(tmp_path / "closed.pem", b"secret")
    with pytest.raises(BundleError, match=r"is encrypted. .*BCD_KEY_PASSWORD"):
        sign(str(tmp_path / "closed.pem"))
    monkeypatch.setenv("BCD_KEY_PASSWORD", "secret")
    sign(str(tmp_path / "closed.pem"))
    assert signing.verify(str(signed), str(tmp_path / "closed.pub"))


def test_a_damaged_bundle_is_not_signed(signed, keys):
    before = (signed / "model.sig").read_bytes()
    change(signed / "model.safetensors")
    with pytest.raises(BundleError, match=r"is not the file that card.json was written for"):
        signing.sign(str(signed), str(keys / "ours.pem"))
    assert (signed / "model.sig").read_bytes() == before


def test_a_bundle_on_a_store_is_signed_and_verified_there(s3, keys):
    uri, public = small_bundle(f"{s3}/signed/model"), f"{s3}/keys/ours.pub"
    storage.write_bytes(public, (keys / "ours.pub").read_bytes())
    signing.sign(uri, str(keys / "ours.pem"))
    digest = signing.verify(uri, public)
    assert bundle.read_card(uri, digest).threshold == 0.5
    storage.write_bytes(f"{uri}/model.safetensors", b"others")
    storage.write_bytes(f"{uri}/new.txt", b"x")
    with pytest.raises(BundleError, match=r"new.txt was added, model.safetensors was changed"):
        signing.verify(uri, public)


@pytest.mark.parametrize("package", ["model_signing", "OpenSSL"])
def test_without_the_extra_a_sentence_says_what_to_install(monkeypatch, package):
    for name in list(sys.modules):
        if name.startswith(("model_signing", package)):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for use in (signing.sign, signing.verify):
        with pytest.raises(
            ConfigError, match=r"not installed \(.*\); run: pip install model-signing pyopenssl"
        ):
            use("model", "key.pem")


JOBS = {
    "score": lambda uri, key: score.run(ScoreConfig(model=uri, input="i", output="o", require_signature=key)),
    "evaluate": lambda uri, key: evaluate.run(
        EvaluateConfig(model=uri, data="d", output="o", require_signature=key)
    ),
    "serve": lambda uri, key: serve.create_application(
        ServiceConfig(model=uri, require_signature=key), "127.0.0.1"
    ),
}


@pytest.mark.parametrize("job", JOBS)
def test_jobs_reject_a_bundle_that_is_not_signed(signed, keys, job, tmp_path, monkeypatch):
    """Before they read a card, start Ray or write anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bundle, "parse_card", None)
    with pytest.raises(BundleError, match=r"other.pub: .*does not match the provided public key"):
        JOBS[job](str(signed), str(keys / "other.pub"))
    (signed / "model.sig").unlink()
    with pytest.raises(BundleError, match="the bundle has no signature"):
        JOBS[job](str(signed), str(keys / "ours.pub"))
    assert [path.name for path in Path().iterdir()] == ["copied"]


def test_a_bundle_replaced_after_it_was_verified_is_not_used(signed, keys):
    """Even if its `model_id` were the same: what each process of a job reads has to be what was verified."""
    uri = str(signed)
    digest = signing.verify(uri, str(keys / "ours.pub"))
    metrics = {"summary": [["AUC", "1.000", "–"]], "n_images": 1, "n_patients": 1}
    bundle.write_card(bundle.read_card(uri).model_copy(update={"metrics": metrics}), uri)
    job = predict.Settings(uri, bundle.identify(uri), card_sha256=digest)
    refused = partial(pytest.raises, BundleError, match="no longer the one whose signature was verified")
    worker = predict.Scorer(job, 1)
    with refused():
        worker({})
    with refused():
        predict.score_rows(None, job)
    with refused(), predict.one_model(job):
        pass
    with refused():
        serve.Replica.__base__(ServiceConfig(model=uri), None, job.model_id, digest)


def test_an_evaluation_leaves_a_signed_card_as_it_is(signed, keys, capsys):
    uri = str(signed)
    metrics = {"summary": [["AUC", "1.000", "–"]], "n_images": 1, "n_patients": 1}
    evaluate._write_metrics(bundle.read_card(uri), metrics, uri)
    assert signing.verify(uri, str(keys / "ours.pub"))
    assert "is signed and keeps its card" in capsys.readouterr().out
    (signed / "model.sig").unlink()
    evaluate._write_metrics(bundle.read_card(uri), metrics, uri)
    assert bundle.read_card(uri).metrics == metrics


def test_an_evaluation_writes_nothing_to_the_hub(hub, capsys):
    pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")
    hub.put("owner/model", {"card.json": b"{}"})
    evaluate._write_metrics(card(), {}, "hf://owner/model")
    assert "is only read and keeps its card" in capsys.readouterr().out


VERIFY = {"verify": lambda uri, key: signing.run(VerifyConfig(bundle=uri, key=key))}


@pytest.mark.parametrize("job", [*JOBS, "verify"])
def test_a_job_reads_one_commit_of_the_hub(hub, job, tmp_path, monkeypatch):
    """The URI that it verifies, records and hands to its workers names the commit of its start."""
    pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")
    sha = hub.put("owner/model", {"card.json": b"{}"})
    monkeypatch.chdir(tmp_path)
    seen = []

    def verified(uri, key):
        hub.put("owner/model", {"card.json": b"other"})
        seen.append(uri)
        raise BundleError("stop")

    monkeypatch.setattr(signing, "verified", verified)
    with pytest.raises(BundleError, match="stop"):
        (JOBS | VERIFY)[job]("hf://owner/model", "k")
    assert seen == [f"hf://owner/model@{sha}"]
    assert storage.read_bytes(f"{seen[0]}/card.json") == b"{}"
