"""Policies for S3 in deploy/, and the requests that they permit."""

import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

DEPLOY = Path(__file__).parent.parent / "deploy"
Request = tuple[str, str]
# What AWS requires for a request, by its method, whether it names an object, and its query. Reference:
# "Actions, resources, and condition keys for Amazon S3". All parts of an upload count as PutObject.
ACTIONS = {
    ("GET", False, "list-type"): "s3:ListBucket",
    ("HEAD", False, ""): "s3:ListBucket",
    ("PUT", False, ""): "s3:CreateBucket",
    ("POST", False, "delete"): "s3:DeleteObject",
    ("GET", True, ""): "s3:GetObject",
    ("HEAD", True, ""): "s3:GetObject",
    ("PUT", True, ""): "s3:PutObject",
    ("PUT", True, "uploadId"): "s3:PutObject",
    ("POST", True, "uploads"): "s3:PutObject",
    ("POST", True, "uploadId"): "s3:PutObject",
    ("DELETE", True, ""): "s3:DeleteObject",
    ("DELETE", True, "uploadId"): "s3:AbortMultipartUpload",
}
# Parts of a query that do not change the action.
DETAILS = {"continuation-token", "delimiter", "max-keys", "partNumber", "prefix"}
# Actions on a bucket, and not on its objects.
OF_BUCKETS = {"s3:ListBucket", "s3:CreateBucket"}


def statements(name: str) -> list[dict[str, Any]]:
    """The statements of a policy."""
    return json.loads((DEPLOY / name).read_text(encoding="utf-8"))["Statement"]


def several(value: str | list[str]) -> list[str]:
    """In a policy one value need not be in a list."""
    return [value] if isinstance(value, str) else value


def actions(name: str) -> set[str]:
    """All that a policy permits."""
    return {action for statement in statements(name) for action in several(statement["Action"])}


def needed(request: Request) -> tuple[str, str]:
    """Action and resource of a request; fails where no action is known for it."""
    method, target = request
    url = urlsplit(target)
    bucket, _, key = unquote(url.path)[1:].partition("/")
    query = parse_qs(url.query, keep_blank_values=True).keys() - DETAILS
    action = ACTIONS[method, bool(key), ",".join(sorted(query))]
    return action, f"arn:aws:s3:::{bucket}" + ("" if action in OF_BUCKETS else f"/{key}")


def used(requests: Iterable[Request]) -> set[str]:
    """The actions that requests need."""
    return {needed(request)[0] for request in requests}


def permits(name: str, request: Request) -> bool:
    """Whether a policy permits a request; of one to delete several objects, which names them in its body,
    whether it permits that anywhere in the bucket."""
    action, resource = needed(request)
    several_objects = action == "s3:DeleteObject" and resource.endswith("/") and request[0] == "POST"
    return any(
        fnmatchcase(resource, pattern) or (several_objects and pattern.startswith(resource))
        for statement in statements(name)
        if action in several(statement["Action"])
        for pattern in several(statement["Resource"])
    )
