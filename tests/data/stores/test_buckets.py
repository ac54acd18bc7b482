from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from bcd import storage
from bcd.data.stores import buckets
from bcd.errors import StorageError


def test_clients_are_shared_until_a_variable_changes(s3, monkeypatch):
    """Each asks for credentials, and 400 at a time are more connections than a process may hold."""
    first = storage.resolve(f"{s3}/a")[0]
    assert storage.resolve(f"{s3}/b")[0] is first
    monkeypatch.setenv("AWS_SESSION_TOKEN", "renewed")
    assert storage.resolve(f"{s3}/a")[0] is not first


@pytest.fixture
def hosts():
    """An S3 store that knows no file, and the hosts that it was called by."""
    called = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            called.append(self.headers["Host"].partition(":")[0] + self.path)
            self.send_response(404)
            self.end_headers()

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}", called
        server.shutdown()


@pytest.mark.parametrize(
    ("variables", "config", "called"),
    [
        ({}, "", "localhost/some/a.png"),
        ({}, "[default]\nregion = x\n", "localhost/some/a.png"),
        ({"AWS_S3_ADDRESSING_STYLE": "virtual"}, "", "some.localhost/a.png"),
        (
            {"AWS_S3_ADDRESSING_STYLE": "auto"},
            "[default]\ns3 =\n  addressing_style = virtual",
            "localhost/some/a.png",
        ),
        ({}, "[default]\ns3 =\n  max_queue_size = 9\n  addressing_style = virtual\n", "some.localhost/a.png"),
        (
            {"AWS_PROFILE": "p"},
            "[default]\n[profile p]\ns3=\n addressing_style=virtual",
            "some.localhost/a.png",
        ),
        ({}, "no config [", "localhost/some/a.png"),
    ],
)
def test_a_bucket_may_be_part_of_the_host(tmp_path, monkeypatch, hosts, variables, config, called):
    (tmp_path / "config").write_text(config)
    own = {"AWS_ENDPOINT_URL": hosts[0], "AWS_CONFIG_FILE": str(tmp_path / "config")}
    own |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for name, value in (own | variables).items():
        monkeypatch.setenv(name, value)
    assert not storage.exists("s3://some/a.png")
    assert hosts[1][0] == called


def test_an_unknown_way_to_address_buckets_is_refused(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:1")
    monkeypatch.setenv("AWS_S3_ADDRESSING_STYLE", "vhost")
    with pytest.raises(
        StorageError, match="S3 addressing style 'vhost': expected one of auto, path, virtual"
    ):
        storage.read_bytes("s3://some/a.png")


def test_other_schemes_have_no_client_here():
    assert [buckets.bucket_client(scheme) for scheme in ("hf", "S3", "")] == [None] * 3
