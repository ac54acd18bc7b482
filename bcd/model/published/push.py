"""Push a bundle to the Hugging Face Hub, as one commit: all of its files, or none."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bcd import storage
from bcd.config.signing import PushConfig
from bcd.errors import BundleError, ConfigError, StorageError
from bcd.model import bundle
from bcd.text import counted

logger = logging.getLogger(__name__)

TARGET = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(@(?P<branch>[^@]+))?", re.IGNORECASE)


def run(config: PushConfig) -> str:
    """Push a bundle and return its URI with the commit that has it.

    Raises:
        ConfigError: the package is not installed, or the target is no repository of models.
        BundleError: the bundle is damaged, or signed without this licence.
        StorageError: the hub refuses it.
    """
    library = _library()
    target = TARGET.fullmatch(config.target)
    if target is None:
        raise ConfigError(f"{config.target}: expected hf://OWNER/NAME or hf://OWNER/NAME@BRANCH")
    source = storage.pinned(config.bundle)
    model_id = bundle.identify(source)
    _state_license(source, config.license)
    with TemporaryDirectory(prefix="bcd-push-") as folder:
        there = [name for name in bundle.FILES if storage.exists(storage.join(source, name))]
        for name in there:
            storage.download(storage.join(source, name), Path(folder, name))
        bundle.require_same(source, model_id, bundle.identify(folder))  # what was checked is what is pushed
        with _naming_target(library, config.target):
            api, name = library.HfApi(), target["name"]
            api.create_repo(name, private=not config.public, exist_ok=True)
            old = set(api.list_repo_files(name, revision=target["branch"])) & set(bundle.FILES)
            changes = [library.CommitOperationAdd(file, str(Path(folder, file))) for file in there]
            changes += [library.CommitOperationDelete(file) for file in sorted(old.difference(there))]
            done = api.create_commit(
                name, changes, commit_message=f"bcd: model {model_id}", revision=target["branch"]
            )
    uri = f"hf://{name}@{done.oid}"
    logger.info(f"pushed {counted(len(there), 'file')} of the model {model_id}: {uri}")
    return uri


def _library() -> Any:
    try:
        return import_module("huggingface_hub")
    except ImportError as error:
        raise ConfigError(
            f"the hub requires a package that is not installed ({error.name} is missing); run: "
            "pip install huggingface_hub"
        ) from None


def _state_license(uri: str, license_id: str | None) -> None:
    """Write the licence into the card and README of a bundle; its signature covers both."""
    card = bundle.read_card(uri)
    if license_id in (None, card.bundle_license):
        if card.bundle_license is None:
            logger.info(f"{uri} states no licence, without which others may not use it: see --license")
        return
    if bundle.is_signed(uri):
        raise BundleError(
            f"{uri} is signed, and its signature covers the licence: delete {bundle.SIGNATURE} there, push "
            "with --license, have the bundle signed again, and push again"
        )
    bundle.write_card(card.model_copy(update={"bundle_license": license_id}), uri)


@contextmanager
def _naming_target(library: Any, uri: str) -> Iterator[None]:
    """Convert what the library raises into a sentence."""
    try:
        yield
    # RuntimeError of a file that could not be uploaded, ValueError of metadata that the hub rejects.
    except (OSError, RuntimeError, ValueError, library.errors.HfHubHTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = "; set HF_TOKEN to a token that may write there" if status in (401, 403, 404) else ""
        raise StorageError(f"{uri}: cannot push: {' '.join(str(error).split())}{hint}") from error
