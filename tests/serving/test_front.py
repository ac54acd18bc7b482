import socket

import pytest

from bcd.errors import ConfigError, ResourceError
from bcd.imaging.image import ImageError
from bcd.serving import front, middleware


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv(middleware.TOKEN_VARIABLE, raising=False)


def test_the_token_comes_from_a_file_or_else_from_the_variable(tmp_path, monkeypatch):
    assert front.read_digest(None, "127.0.0.1") is None
    assert front.read_digest(None, None) is None
    monkeypatch.setenv(middleware.TOKEN_VARIABLE, " of-the-variable\n")
    assert front.read_digest(None, "0.0.0.0") == middleware.digest("of-the-variable")
    (tmp_path / "token").write_text("of-the-file\n")
    assert front.read_digest(str(tmp_path / "token"), "0.0.0.0") == middleware.digest("of-the-file")


def test_a_token_that_protects_nothing_is_rejected(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"listening on 0\.0\.0\.0 requires a token"):
        front.read_digest(None, "0.0.0.0")
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        front.read_digest(str(tmp_path / "token"), "127.0.0.1")
    monkeypatch.setenv(middleware.TOKEN_VARIABLE, "two words")
    with pytest.raises(ConfigError, match="no spaces"):
        front.read_digest(None, "127.0.0.1")


def test_an_address_that_is_used_is_named():
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        with pytest.raises(ResourceError, match=f"--host 127.0.0.1 --port {port}"):
            front.require_free("127.0.0.1", port)
    front.require_free("127.0.0.1", port)


@pytest.mark.parametrize(
    ("code", "status", "headers"),
    [
        ("truncated", 422, {}),
        ("whole_slide", 415, {}),
        ("unreadable", 422, {}),
        ("unavailable", 503, {"Retry-After": "1"}),
    ],
)
def test_errors_of_images_are_answers(code, status, headers):
    refusal = front.refusal(ImageError(code, "why"))
    assert (refusal.status, refusal.code, refusal.message) == (status, code, "why")
    assert refusal.headers == headers | {"x-error-code": code}
