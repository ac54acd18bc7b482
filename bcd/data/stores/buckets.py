"""Clients of pyarrow's own: Amazon S3 with all that speaks its protocol, and Google Cloud Storage."""

import os
import re
from collections.abc import Mapping
from configparser import ConfigParser
from configparser import Error as ConfigError
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

from pyarrow import fs

SCHEMES = ("s3", "gs")
ADDRESSING_STYLES = ("auto", "path", "virtual")
# Attempts of a request that a store does not answer or defers (503), with growing pauses: 7 to 10 s in all.
ATTEMPTS = 5


def bucket_client(scheme: str) -> fs.FileSystem | None:
    """The client for `s3` or `gs`; None for another scheme. Raises ValueError for a wrong setting."""
    if scheme == "s3":
        return _s3(tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))
    return _gs() if scheme == "gs" else None


@lru_cache(maxsize=4)
def _s3(variables: tuple[tuple[str, str], ...]) -> fs.S3FileSystem:
    """The client for these AWS variables, shared because each requests credentials and opens connections."""
    known = dict(variables)
    endpoint = known.get("AWS_ENDPOINT_URL_S3") or known.get("AWS_ENDPOINT_URL")
    region = known.get("AWS_REGION") or known.get("AWS_DEFAULT_REGION")
    # A small object is one PUT, and not the three requests of a multipart upload.
    tries = fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)
    client = partial(fs.S3FileSystem, retry_strategy=tries, allow_delayed_open=True)
    if not endpoint:
        return client(region=region)
    scheme, _, host = endpoint.rpartition("://")
    return client(
        region=region or "us-east-1",
        endpoint_override=host,
        scheme=scheme or "https",
        force_virtual_addressing=_addressing(known) == "virtual",
    )


def _addressing(known: Mapping[str, str]) -> str:
    """Addressing style of buckets: `virtual` (BUCKET.HOST) where the variable `AWS_S3_ADDRESSING_STYLE` or,
    as in AWS's tools, `s3 = addressing_style` of the profile says so, else HOST/BUCKET."""
    profile = known.get("AWS_PROFILE") or known.get("AWS_DEFAULT_PROFILE") or "default"
    config = ConfigParser(strict=False, interpolation=None)
    with suppress(OSError, ConfigError, UnicodeDecodeError):
        config.read(Path(known.get("AWS_CONFIG_FILE") or "~/.aws/config").expanduser())
    section = "default" if profile == "default" else f"profile {profile}"
    given = re.search(r"addressing_style\s*=\s*(\w+)", config.get(section, "s3", fallback=""))
    style = known.get("AWS_S3_ADDRESSING_STYLE") or (given[1] if given else "auto")
    if style not in ADDRESSING_STYLES:
        raise ValueError(f"S3 addressing style {style!r}: expected one of {', '.join(ADDRESSING_STYLES)}")
    return style


@lru_cache(maxsize=1)
def _gs() -> fs.GcsFileSystem:
    return fs.GcsFileSystem()
