import signal
import socket
import subprocess
import sys

import httpx
import pytest

from bcd.config.serving import ViewConfig
from bcd.errors import ConfigError, DataError, ResourceError
from bcd.serving.viewer import scored, view
from tests import viewed
from tests.cluster import free_port, listens, wait_for

# What the command imports when it has begun to answer.
PROGRAM = """
import atexit, sys
from bcd import cli
atexit.register(lambda: print(sorted({'ray', 'torch', 'fastapi'} & set(sys.modules))))
sys.argv[0] = "bcd view"
cli.main("view")
"""


@pytest.mark.process
def test_it_answers_until_it_is_told_to_end_without_ray_and_torch(tmp_path):
    made, port = viewed.make(str(tmp_path)), free_port()
    command = [sys.executable, "-c", PROGRAM, made.uri, "--port", str(port)]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: listens(port) or job.poll() is not None, 60, "the viewer")
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{url}/v1/view").json()["n_images"] == viewed.FIELDS
        tile = httpx.get(f"{url}/v1/view/pixels/10/0_0", params={"name": viewed.SLIDE})
        assert tile.headers["content-type"] == "image/jpeg"
        # A page from elsewhere whose name resolves to this machine.
        assert httpx.get(f"{url}/v1/view", headers={"Host": "evil.example"}).status_code == 403
        job.send_signal(signal.SIGTERM)
        said = job.communicate(timeout=60)[0]
    finally:
        job.kill()
    assert job.returncode == 0, said
    assert f"viewing {made.uri} at {url}/slides" in said
    assert said.endswith("[]\n")
    assert "in/" not in said


def test_the_address_of_any_row_of_the_table(tmp_path):
    made = viewed.make(str(tmp_path))
    output = scored.open_scored(made.uri)
    page = "/slides/case%207%2Fa%2Bb%20%231.tif"
    assert view.page_of(output, None) == "/slides"
    assert view.page_of(output, viewed.SLIDE) == page
    assert view.page_of(output, "field 2.png") == "/slides/field%202.png"
    assert view.page_of(output, f"{viewed.SLIDE}#200,80,0.5") == f"{page}#250,120,1"
    for name in (f"{viewed.SLIDE}#1,1,0.5", "../in", "", "nothing"):
        with pytest.raises(DataError, match="has no slide, field or tile"):
            view.page_of(output, name)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"host": "0.0.0.0"}, ConfigError, "requires a token"),
        ({"output": "/nothing/here"}, DataError, "expected the --output of a scoring job"),
    ],
)
def test_settings_that_cannot_be(settings, error, said, tmp_path, monkeypatch):
    monkeypatch.delenv("BCD_API_TOKEN", raising=False)
    with pytest.raises(error, match=said):
        view.run(ViewConfig(**{"output": str(tmp_path)} | settings))


def test_a_port_that_is_used_is_named(tmp_path):
    made = viewed.make(str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        with pytest.raises(ResourceError, match=f"--port {port}"):
            view.run(ViewConfig(output=made.uri, port=port))
