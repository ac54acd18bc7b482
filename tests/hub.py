"""A hub on this machine: the part of Hugging Face's HTTP API that reading and pushing use, from memory.

It also serves as a plain web server: files at /OWNER/NAME/resolve/REVISION/PATH, with ranges and ETags.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN, LICENSES = "hf_secret", {"apache-2.0", "cc-by-4.0", "cc0-1.0", "other"}
# Files of this size and more are sent aside, as to a large-file store.
LARGE_BYTES = 1_000


@dataclass
class Repository:
    """Commits, the last of which is `main`: files by path."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, changes: dict[str, bytes | None]) -> str:
        files = {**self.files("main"), **changes}
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = {path: content for path, content in files.items() if content is not None}
        return sha

    def revision(self, name: str) -> str | None:
        return (
            next(reversed(self.commits), None) if name == "main" else name if name in self.commits else None
        )

    def files(self, name: str) -> dict[str, bytes]:
        return self.commits.get(self.revision(name) or "", {})


@dataclass
class Hub:
    """Where it listens, its repositories by id (`models/OWNER/NAME`), and what it answers instead."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    fault: Callable[[str, str], int | None] = lambda method, path: None

    @property
    def variables(self) -> dict[str, str]:
        """Environment of a job that, with all its workers, knows this hub."""
        own = {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1"}
        return own | {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": own}})}

    def put(self, name: str, files: dict[str, bytes], kind: str = "models", private: bool = False) -> str:
        """A commit with these files, and Git's own, in a repository of this name; returns its hash."""
        found = self.repositories.setdefault(f"{kind}/{name}", Repository(private))
        return found.commit({".gitattributes": b"*.bin filter=lfs", **files})


def blob(content: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class RefusedError(Exception):
    """An answer: status and the code that clients look at."""


def answered(hub: Hub, method: str, path: str, body: bytes, token: bool) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer."""
    url = urlsplit(path)
    parts = [unquote(part) for part in url.path.strip("/").split("/")]
    document: Any
    match parts:
        case ["api", "repos", "create"]:
            document = created(hub, json.loads(body), token)
        case ["api", "validate-yaml"]:
            document = validated(json.loads(body)["content"])
        case ["api", kind, owner, name, *rest]:
            document = asked(hub, kind, f"{owner}/{name}", rest, url.query, body, token)
        case ["large", oid] if method == "PUT":
            assert hashlib.sha256(body).hexdigest() == oid
            hub.large[oid], document = body, {}
        case [owner, name, "info", "lfs", "objects", "batch"]:
            document = batch(hub, json.loads(body)["objects"])
        case _:
            kind, rest = (parts[0], parts[1:]) if parts[0] == "datasets" else ("models", parts)
            if rest[2:3] != ["resolve"]:
                raise RefusedError(404, "EntryNotFound")
            content = file_of(hub, kind, "/".join(rest[:2]), rest[3], "/".join(rest[4:]), token)
            return 200, {"ETag": f'"{blob(content)}"'}, content
    return 200, {"Content-Type": "application/json"}, json.dumps(document).encode()


def repository(hub: Hub, kind: str, name: str, token: bool) -> Repository:
    found = hub.repositories.get(f"{kind}/{name}")
    if found is None or (found.private and not token):
        raise RefusedError(404 if token else 401, "RepoNotFound")
    return found


def file_of(hub: Hub, kind: str, name: str, revision: str, path: str, token: bool) -> bytes:
    content = repository(hub, kind, name, token).files(revision).get(path)
    if content is None:
        raise RefusedError(404, "EntryNotFound")
    return content


def created(hub: Hub, wanted: dict[str, Any], token: bool) -> dict[str, Any]:
    if not token:
        raise RefusedError(401, "")
    name = f"{wanted['organization']}/{wanted['name']}"
    if f"models/{name}" in hub.repositories:
        raise RefusedError(409, f"{hub.endpoint}/{name}")
    hub.put(name, {}, private=wanted.get("visibility") == "private")
    return {"url": f"{hub.endpoint}/{name}"}


def validated(readme: str) -> dict[str, Any]:
    found = yaml.safe_load(readme.split("---\n")[1])
    if found.get("license", "other") not in LICENSES:
        raise RefusedError(400, "license is none that the hub knows")
    return {"errors": [], "warnings": []}


def batch(hub: Hub, objects: list[dict[str, Any]]) -> dict[str, Any]:
    def one(wanted: dict[str, Any]) -> dict[str, Any]:
        oid, where = wanted["oid"], f"{hub.endpoint}/large/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": where}}} if oid not in hub.large else wanted

    return {"transfer": "basic", "objects": list(map(one, objects))}


def asked(
    hub: Hub, kind: str, name: str, rest: list[str], query: str, body: bytes, token: bool
) -> dict[str, Any] | list[dict[str, Any]]:
    """The answer of the API about a repository."""
    found = repository(hub, kind, name, token)
    revision = rest[1] if len(rest) > 1 else "main"
    sha = found.revision(revision)
    if sha is None:
        raise RefusedError(404, "RevisionNotFound")
    if rest[:1] == ["tree"]:
        return tree(found.commits[sha], "/".join(rest[2:]), "recursive=true" in query.lower())
    if rest[:1] == ["preupload"]:
        return {"files": [mode(found, each) for each in json.loads(body)["files"]]}
    if rest[:1] == ["commit"]:
        if not token:
            raise RefusedError(403, "")
        new = found.commit(changes(hub, body))
        return {"success": True, "commitOid": new, "commitUrl": f"{hub.endpoint}/{name}/commit/{new}"}
    siblings = [{"rfilename": path} for path in found.commits[sha]]
    return {"id": name, "sha": sha, "private": found.private, "tags": [], "siblings": siblings}


def tree(files: dict[str, bytes], below: str, recursive: bool) -> list[dict[str, Any]]:
    prefix, entries = f"{below}/" if below else "", {}
    for path, content in files.items():
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for n in range(1, len(parts)) if recursive else range(1, min(2, len(parts))):
            folder = prefix + "/".join(parts[:n])
            entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": blob(folder.encode())}
        if recursive or len(parts) == 1:
            facts = {"type": "file", "path": path, "size": len(content), "oid": blob(content)}
            entries[path] = facts
    if below and not entries:
        raise RefusedError(404, "EntryNotFound")
    return list(entries.values())


def mode(found: Repository, wanted: dict[str, Any]) -> dict[str, Any]:
    path, there = wanted["path"], found.files("main").get(wanted["path"])
    known = {"oid": blob(there)} if there is not None else {}
    large = "lfs" if wanted["size"] >= LARGE_BYTES and not path.endswith((".json", ".md")) else "regular"
    return {"path": path, "uploadMode": large, "shouldIgnore": False, **known}


def changes(hub: Hub, body: bytes) -> dict[str, bytes | None]:
    found: dict[str, bytes | None] = {}
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            found[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            found[value["path"]] = hub.large[value["oid"]]
        elif line["key"] == "deletedFile":
            found[value["path"]] = None
    return found


@contextmanager
def listening() -> Iterator[Hub]:
    """A hub without repositories."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            try:
                if fault := hub.fault(self.command, self.path):
                    raise RefusedError(fault, "")
                status, headers, content = answered(hub, self.command, self.path, body, token)
            except RefusedError as error:
                status, code = error.args
                headers = {"X-Error-Code": code, "X-Error-Message": code}
                document = {"errors": [{"message": code}], "url": code}
                content = json.dumps(document).encode()
            if status == 200 and (ranged := self.headers.get("Range")):
                first, last = ranged.removeprefix("bytes=").split("-")
                whole, content = content, content[int(first) : int(last) + 1 if last else None]
                status = 206
                end = int(first) + len(content) - 1
                headers["Content-Range"] = f"bytes {first}-{end}/{len(whole)}"
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        yield hub
        server.shutdown()
