"""Clients of the service, as many as asked for: each sends images one after the other.

    BCD_IMAGES=FOLDER locust -f benchmarks/locustfile.py --host http://127.0.0.1:8000

A client that gets a 503 retries after the time in Retry-After, as clients should. The token is
that of the variable BCD_API_TOKEN. `python -m benchmarks.serve_load` runs all this and prints a table.
"""

import itertools
import os
import random

import gevent
from locust import HttpUser, events, task

from bcd import schema, storage
from bcd.data import archive

contents: list[bytes] = []


@events.test_start.add_listener
def read_pictures(**_: object) -> None:
    """Once, before the clients begin."""
    uris = archive.list_inputs(os.environ["BCD_IMAGES"]).table[schema.URI].to_pylist()
    contents.extend(storage.read_bytes(uri) for uri in uris)


class Client(HttpUser):
    """Asks for one prediction after the other."""

    def on_start(self) -> None:
        """Its own order of the images."""
        self._pictures = itertools.cycle(random.sample(contents, len(contents)))
        token = os.environ.get("BCD_API_TOKEN")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    @task
    def predict(self) -> None:
        """One image; a 503 with Retry-After is an answer, not a failure."""
        with self.client.post(
            "/v1/predict",
            data=next(self._pictures),
            headers=self._headers,
            timeout=120,
            catch_response=True,
        ) as answer:
            answer.request_meta["name"] = str(answer.status_code)
            if answer.status_code == 503 and "Retry-After" in answer.headers:
                answer.success()
                gevent.sleep(float(answer.headers["Retry-After"]))
