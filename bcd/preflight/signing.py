"""Signatures of model bundles, in the format of OpenSSF Model Signing: the jobs that sign and verify, and the
check of jobs that require a signature.

A signature covers every file of the bundle. The process that verifies is not the one that loads, and the
bundle may be replaced in between. So what is verified is a private copy, and the SHA-256 of the card in it is
handed to every process that loads the bundle: it uses no other card, and no weights but those of this card.
"""

import base64
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bcd import storage
from bcd.config.signing import SignConfig, VerifyConfig
from bcd.errors import BundleError, ConfigError
from bcd.model import bundle
from bcd.model.bundle import CARD, SIGNATURE
from bcd.text import counted, some

logger = logging.getLogger(__name__)

# In a private folder, beside the signature: the copy of the bundle, and the key to verify with.
COPY, KEY = "bundle", "key.pem"
# In a PEM file of certificates, and in a signature that was made with one.
CERTIFICATE, CHAIN = b"-----BEGIN CERTIFICATE", "x509CertificateChain"
# Of a key, and of a signature.
MOST_BYTES = 2**20
EXPECTED = (
    "Expected a private key (EC) in PEM; one with a password, which the variable BCD_KEY_PASSWORD holds, "
    "cannot have a --certificate"
)
SIGN_AGAIN = "have it signed: bcd sign BUNDLE --key PRIVATE_KEY"


@dataclass(frozen=True)
class Statement:
    """What a signature states, valid or not: the SHA-256 of each file by its name, and whether it was made
    with a certificate."""

    files: dict[str, str]
    by_certificate: bool


def run(config: SignConfig | VerifyConfig) -> None:
    """Sign or verify a bundle. Raises BundleError where it cannot be signed, or is not as it was signed."""
    if isinstance(config, SignConfig):
        sign(config.bundle, config.key, config.certificate)
    else:
        verified(storage.pinned(config.bundle), config.key)


def verified(uri: str, key: str | None) -> str | None:
    """`verify` for a job, which prints the result; None where the job requires no signature."""
    if key is None:
        return None
    digest = verify(uri, key)
    logger.info(f"{uri}: the signature is valid for {key}")
    return digest


def sign(uri: str, key: str, certificate: str | None = None) -> None:
    """Write the signature of a bundle beside its files, in place of another.

    Args:
        uri: of the bundle, which is checked first.
        key: path of the private key.
        certificate: path of its certificate, followed by those that lead to a root.

    Raises:
        ConfigError: packages are not installed, or a key is not on this machine.
        BundleError: the bundle is damaged, or the key or certificate cannot be used.
    """
    _require_library()
    storage.require_writable(uri)
    from model_signing import signing

    private, chain = _local(key), _local(certificate) if certificate else None
    model_id = bundle.identify(uri)
    with _copied(uri) as folder:
        bundle.require_same(uri, model_id, bundle.identify(str(folder / COPY)))
        with _rejecting(f"{uri}: cannot sign with --key {key}", EXPECTED):
            config = signing.Config().set_hashing_config(_every_file())
            if chain:
                config.use_certificate_signer(
                    private_key=private, signing_certificate=chain, certificate_chain=[chain]
                )
            else:
                # Passed on to `cryptography`, which expects bytes.
                password: Any = os.environ.get("BCD_KEY_PASSWORD", "").encode() or None
                config.use_elliptic_key_signer(private_key=private, password=password)
            config.sign(folder / COPY, folder / SIGNATURE)
        signature = (folder / SIGNATURE).read_bytes()
    storage.write_bytes(storage.join(uri, SIGNATURE), signature)
    n_files = counted(len(_parsed(signature).files), "file")
    logger.info(f"signed {n_files} of the model {model_id}: {storage.join(uri, SIGNATURE)}")


def verify(uri: str, key: str) -> str:
    """Verify the signature of a bundle and return the SHA-256 of its card, for `predictor.load`.

    Args:
        uri: of the bundle.
        key: URI of the public key, or of the root certificates to which the signer's must lead.

    Raises:
        ConfigError: packages are not installed.
        BundleError: there is no valid signature by this key, or a file was changed, added or removed.
    """
    _require_library()
    known = storage.read_bytes(key, MOST_BYTES)
    if not bundle.is_signed(uri):
        raise BundleError(
            f"{uri}: the bundle has no signature, expected {SIGNATURE} there. Copy all of its files, or "
            f"{SIGN_AGAIN}"
        )
    signature = storage.read_bytes(storage.join(uri, SIGNATURE), MOST_BYTES)
    with _copied(uri) as folder:
        (folder / SIGNATURE).write_bytes(signature)
        (folder / KEY).write_bytes(known)
        expected = "Expected a public key (EC) or root certificates, in PEM"
        with _rejecting(f"--key {key} cannot be used", expected):
            config = _verifier(folder / KEY, CERTIFICATE in known)
        advice = (
            "Copy the bundle again from where it was signed, or use the key of who signed it. If a change is "
            f"meant, {SIGN_AGAIN}"
        )
        with _rejecting(f"{uri}: the signature is not valid for --key {key}", advice):
            statement = _parsed(signature)
            _require_kind(statement, CERTIFICATE in known)
            _require_files(statement, folder / COPY)
            config.verify(folder / COPY, folder / SIGNATURE)
    return statement.files[CARD]


def _require_library() -> None:
    try:
        import_module("model_signing.signing")
    except ImportError as error:
        raise ConfigError(
            f"signatures require packages that are not installed ({error.name} is missing); run: "
            "pip install model-signing pyopenssl"
        ) from None


def _verifier(key: Path, by_certificate: bool) -> Any:
    from model_signing import verifying

    config = verifying.Config().set_hashing_config(_every_file())
    if by_certificate:
        return config.use_certificate_verifier(certificate_chain=[key])
    return config.use_elliptic_key_verifier(public_key=key)


def _every_file() -> Any:
    """Settings to hash every file; by default those of git are left out."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=(), ignore_git_paths=False)


def _local(path: str) -> Path:
    """The path of a private key or its certificate. Raises ConfigError where it is not on this machine."""
    if storage.is_remote(path):
        raise ConfigError(f"{path}: expected a file on this machine, so that no private key is on a store")
    storage.read_bytes(path, MOST_BYTES)  # raises the error of a file that cannot be read
    return Path(storage.absolute(path))


@contextmanager
def _copied(uri: str) -> Iterator[Path]:
    """A private folder with a copy of a bundle's files but the signature, in `COPY`."""
    listing = storage.list_folder(uri)
    others = [f"{counted(n, 'entry', 'entries')} ({why})" for why, n in listing.passed.items()]
    # A bundle has no folders, and a store has names that are outside of any folder of a disk.
    others += [file.path for file in listing.files if "/" in file.path]
    if others := [*others, *listing.faults]:
        raise BundleError(
            f"{uri}: the bundle contains {some(others)}: no signature covers folders and hidden files. "
            "Delete them there, or copy the bundle again"
        )
    with TemporaryDirectory(prefix="bcd-sign-") as folder:
        Path(folder, COPY).mkdir()
        for file in listing.files:
            if file.path != SIGNATURE:
                storage.download(file.uri, Path(folder, COPY, file.path))
        yield Path(folder)


@contextmanager
def _rejecting(what: str, advice: str) -> Iterator[None]:
    """Convert what the library raises for keys, signatures and files into a BundleError."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from OpenSSL.crypto import X509StoreContextError

    try:
        yield
    except InvalidSignature:
        raise BundleError(f"{what}: it was made with another key. {advice}") from None
    except (
        *(ValueError, TypeError, AttributeError, LookupError, RecursionError),
        *(UnsupportedAlgorithm, X509StoreContextError),
    ) as error:
        raise BundleError(f"{what}: {str(error).rstrip('.? ') or type(error).__name__}. {advice}") from error


def _parsed(signature: bytes) -> Statement:
    try:
        content = json.loads(signature)
        statement = json.loads(base64.b64decode(content["dsseEnvelope"]["payload"]))
        files = {each["name"]: each["digest"] for each in statement["predicate"]["resources"]}
        return Statement(files, CHAIN in content["verificationMaterial"])
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{SIGNATURE} is damaged") from error


def _require_kind(statement: Statement, by_certificate: bool) -> None:
    kinds = "a key alone", "a key and its certificate"
    if statement.by_certificate != by_certificate:
        made, given = kinds[statement.by_certificate], kinds[by_certificate]
        raise ValueError(f"it was made with {made}, and --key is for those made with {given}")


def _require_files(statement: Statement, folder: Path) -> None:
    """Raise ValueError unless a folder contains the files of a statement, the card among them. The library
    compares them, too; its sentences print digests as they are in memory."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    signed, there = statement.files.keys() | {CARD}, digests.keys()
    faults = [f"{name} is missing" for name in sorted(signed - there)]
    faults += [f"{name} was added" for name in sorted(there - signed)]
    both = sorted(signed & there)
    faults += [f"{name} was changed" for name in both if statement.files.get(name) != digests[name]]
    if faults:
        raise ValueError(some(faults))
