"""Done when 2 and 8: a long archive and a long training, while a host is lost and comes back again and again.

BCD_SOAK_MINUTES=60 BCD_SOAK_EPOCHS=60 pytest -s -m trial tests/cluster/test_soak.py
"""

import itertools
import os
import re
import tempfile
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.slides import slide_cache
from tests.archives import write_manifest
from tests.cluster import PATIENCE_S, read_json, wait_for
from tests.cluster.hosts import LOSSES, SCORER, TRAINER
from tests.cluster.memory import memory
from tests.end_to_end.test_score_jobs import assert_same, table
from tests.trained import check_whole

pytestmark = [pytest.mark.ray, pytest.mark.trial]
# What the archive would take on one undisturbed host, twice as long as here, and the length of the training.
MINUTES = float(os.environ.get("BCD_SOAK_MINUTES", "10"))
EPOCHS = int(os.environ.get("BCD_SOAK_EPOCHS", "12"))
SECONDS_BETWEEN_LOSSES = 90
# Private memory and object store, the largest of the last third of the job against that of the first.
FLAT = 1.15


def come_and_go(job, hosts, process, until_next):
    """Lose worker `two` and let it come back until the job ends; each time that it works again, what the head
    and the other host hold in memory, in bytes.

    `until_next`, asked when a host is lost, gives what must hold before the next loss.
    """
    started = time.monotonic()
    for number, loss in enumerate(itertools.cycle(LOSSES), start=1):
        next_may_come = until_next()
        hosts.lose(loss)
        hosts.leave(hosts.two)
        hosts.join(hosts.two)
        job.wait_until(lambda: hosts.two.runs(process), "work on the host that came back")
        if job.ended:
            return
        used = memory(itertools.chain(hosts.head.processes().items(), hosts.one.processes().items())).own
        minutes = (time.monotonic() - started) / 60
        print(f"{minutes:.1f} min: host lost for the {number}. time ({loss}), and back;", end=" ")
        print(f"head and the other host hold {used / 2**20:,.0f} MiB", flush=True)
        yield used
        job.wait_until(next_may_come, "the next loss")


def some_time():
    """From one loss to the next; Ray needs a third of it to miss a host whose cable was pulled."""
    then = time.monotonic() + SECONDS_BETWEEN_LOSSES
    return lambda: time.monotonic() > then


def an_epoch_kept(job):
    """The checkpoint of one more epoch stands: the exposure of the next is written after it."""

    def n_epochs():
        return len(storage.list_files_if_any(f"{job.output}/exposure"))

    before = n_epochs()
    return lambda: n_epochs() > before + 1


def repeated(undisturbed, n, uri):
    """Write a manifest of n rows, the pictures of the archive over and over."""
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder, "manifest.csv"), undisturbed[schema.URI].to_pylist(), n)
        storage.write_bytes(uri, Path(folder, "manifest.csv").read_bytes())
    return uri


def test_a_long_archive_while_a_host_comes_and_goes(undisturbed, both, scoring, bucket):
    n = int(read_json(f"{bucket}/undisturbed/summary.json")["rows_per_s"] * 60 * MINUTES)
    job = scoring("--compile", "off", source=repeated(undisturbed, n, f"{bucket}/long.csv"))
    job.wait_for_work_on(both.one, both.two, of=SCORER)
    used = list(come_and_go(job, both, SCORER, some_time))
    job.succeed()
    print(f"{n:,} rows, {read_json(f'{job.output}/summary.json')['rows_per_s']:.1f} a second")
    check_rows(table(job.output), undisturbed, n)
    third = max(1, len(used) // 3)
    assert max(used[-third:]) < FLAT * max(used[:third])
    check_left_behind(both, job.output, f"{bucket}/undisturbed")


def check_rows(found, undisturbed, n):
    """Every row is there once, and is that of its picture in the undisturbed table."""
    assert found[schema.IMAGE_ID].to_pylist() == [f"{i:08d}" for i in range(n)]
    place = {uri: i for i, uri in enumerate(undisturbed[schema.URI].to_pylist())}
    expected = undisturbed.take(pa.array([place[uri] for uri in found[schema.URI].to_pylist()]))
    at = expected.schema.get_field_index(schema.IMAGE_ID)
    assert_same(found, expected.set_column(at, schema.IMAGE_ID, found[schema.IMAGE_ID]))


def check_left_behind(hosts, output, undisturbed):
    """No process of the job, no zombie, no temporary file but the cache of slides, which is kept for the next
    job; in the output nothing but what an undisturbed run leaves."""
    for host in (hosts.head, hosts.one):
        wait_for(lambda host=host: not host.runs("MapBatches"), PATIENCE_S, "the end of the workers")
        assert not host.runs("jobs/score.py")
        assert not host.zombies()
        files = [path.relative_to(host.tmp) for path in host.tmp.rglob("*") if path.is_file()]
        assert [path for path in files if path.parts[0] != slide_cache.CACHE.name] == []
    assert _entries(output) == _entries(undisturbed)


def _entries(uri):
    return {file.path.partition("/")[0] for file in storage.list_files(uri)}


def test_a_long_training_while_a_host_comes_and_goes(both, training):
    """A loss costs the running epoch at most, and a host that comes back is taken.

    Four workers are more than one host has CPUs for.
    """
    job = training("--num-workers", "1-4", "--epochs", str(EPOCHS), "--max-failures", str(EPOCHS))
    job.wait_for_work_on(both.one, both.two, of=TRAINER)
    losses = len(list(come_and_go(job, both, TRAINER, partial(an_epoch_kept, job))))
    log = job.succeed()
    check_whole(job.output, EPOCHS)
    workers = [record["workers"] for record in read_json(f"{job.output}/history.json")]
    print(f"{losses} losses; workers of each epoch: {''.join(map(str, workers))}")
    assert max(workers) == 4
    told = re.findall(rf"epoch (\d+)/{EPOCHS}: ", log)
    assert len(told) <= EPOCHS + losses + 1
