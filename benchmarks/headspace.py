"""Headspace of training and scoring: the rate of a run over that of the same worker fed with one batch.

    python -m benchmarks.headspace --model MODEL --data DATA --slide SLIDE

Trains a network of the size of MODEL from random weights, from files (`--prepared off`), from prepared images
as Ray Data streams them, and from memory. Scores with MODEL the same fields from files and from prepared
images, and the tiles of the slide. Rows are repeated to `--rows`. Before and after each, because the speed of
a machine drifts, a process of its own computes one batch over and over, with the threads and memory settings
of a worker: headspace is the rate of the run over the mean of these two. `recorded` is what the run itself
states, which compares with the speed at the same moment. Start-up does not count: of training the first
epoch, of scoring what comes before the end of the first batches.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from unittest.mock import patch

import pyarrow as pa
import pyarrow.compute as pc

from bcd import schema, storage
from bcd.config.training import TrainConfig
from bcd.data import archive
from bcd.model import bundle, weights
from bcd.runtime import cluster, datasets, predict, prepare
from bcd.scoring import ledger, tiling
from bcd.scoring.score import ROWS_PER_BLOCK
from bcd.taxonomy import TRAIN
from bcd.training import feed, train

# Each is run in a process of its own, and prints images per second.
TRAINED = """
import sys, time, torch
from bcd.config.training import TrainConfig
from bcd.model import resnet, train_step, weights
from bcd.runtime import cluster
config = TrainConfig.model_validate_json(sys.argv[1])
cluster.share_cores(1)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
resnet.set_precision(config.precision)
size = config.input_size_px
network = weights.build(2, None, 0, config.architecture).to(device).to(memory_format=torch.channels_last)
optimizer = train_step.optimizer(network, config)
step = train_step.Step(network.train(), optimizer, device, config)
images = torch.randint(0, 256, (config.batch_size, *size, 3), dtype=torch.uint8)
target = torch.arange(config.batch_size) % 2
for n_steps in (2, 12):
    started = time.perf_counter()
    for _ in range(n_steps):
        loss = step(images, target, config.learning_rate)
    float(loss)
    rate = n_steps * config.batch_size / (time.perf_counter() - started)
print(rate)
"""
SCORED = """
import sys, time
from bcd import storage
from bcd.data import read
from bcd.model import bundle
from bcd.runtime import predict
model_uri, precision, rows_uri, threads = sys.argv[1:]
card, rows = bundle.read_card(model_uri), storage.read_table(rows_uri)
batch = read.pixels(rows, **predict.reading_options(card, predict.CARRIED))
worker = predict.Scorer(predict.Settings(model_uri, bundle.identify(model_uri), precision), int(threads))
for n_batches in (1, 8):
    started = time.perf_counter()
    for _ in range(n_batches):
        worker(batch)
    rate = n_batches * len(rows) / (time.perf_counter() - started)
print(rate)
"""


def fed_rate(code: str, *arguments: str) -> float:
    """Images per second of a worker that is given one batch over and over."""
    environment = os.environ | cluster.MODEL_VARIABLES
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def trained(config: TrainConfig, n_rows: int, in_memory: bool) -> tuple[float, float]:
    """Images per second of the later epochs, and their recorded headspace."""
    table, _ = prepare.prepare(config)
    table = prepare.located(table, prepare.store_of(config))
    is_train = pc.equal(table[schema.PART], TRAIN)
    table = pa.concat_tables([table.filter(pc.invert(is_train)), repeated(table.filter(is_train), n_rows)])
    with tempfile.TemporaryDirectory() as folder, patch.object(feed, "_fits", lambda n_bytes: in_memory):
        fed = feed.feed_of(config, table)
        given = weights.pretrained(config.weights, config.architecture)
        result = train.train_model(config, folder, fed, given, cluster.scaling(config))
    later = result.return_value[1:]
    rate, recorded = (sum(one[name] for one in later) / len(later) for name in ("images_per_s", "headspace"))
    return rate, recorded


def scored(rows: pa.Table, settings: predict.Settings) -> tuple[float, float]:
    """Rows per second from the first commit on, and the recorded headspace."""
    finished, computed, elapsed = [], 0.0, 0.0
    with tempfile.TemporaryDirectory() as work_uri:
        read = datasets.row_dataset(rows, ROWS_PER_BLOCK, **cluster.beside_models())
        commits = predict.score_rows(read, settings).map_batches(
            ledger.commit,
            fn_kwargs={"work_uri": work_uri},
            batch_size=ROWS_PER_BLOCK,
            batch_format="pyarrow",
            **cluster.beside_models(),
        )
        for counted in commits.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            finished.append((time.monotonic(), pc.sum(counted["rows"]).as_py()))
            computed += pc.sum(counted[schema.COMPUTE_S]).as_py()
            elapsed += pc.sum(counted[schema.ELAPSED_S]).as_py()
    rate = sum(n for _, n in finished[1:]) / (finished[-1][0] - finished[0][0])
    return rate, computed / elapsed


def repeated(rows: pa.Table, n: int) -> pa.Table:
    """The first n of the rows, over and over, each under an id of its own."""
    rows = pa.concat_tables([rows] * -(-n // len(rows))).slice(0, n)
    names = [f"{i:06}-{name}" for i, name in enumerate(rows[schema.IMAGE_ID].to_pylist())]
    at = rows.column_names.index(schema.IMAGE_ID)
    return rows.set_column(at, rows.field(at), pa.array(names))


def tiles_of(slide: str, model_uri: str, plans_uri: str) -> pa.Table:
    """Rows to read for the tiles of a slide."""
    card = bundle.read_card(model_uri)
    size = card.field_width_px, card.field_height_px
    cut = tiling.Tiling(max(card.mpp), *size, mpp=None, min_tissue=0.1)
    found = schema.fill(archive.list_inputs(slide).table, schema.INPUTS)
    return pa.concat_tables(tiling.expand(found, cut, plans_uri, frozenset()))


def compared(
    name: str, before: float, fed: Callable[[], float], run: Callable[[], tuple[float, float]]
) -> float:
    """Measure a run, then a turn of a fed worker, and print a line; returns the rate of that turn."""
    rate, recorded = run()
    after = fed()
    print(
        f"{name}: {rate:.1f} images/s; one batch over and over {before:.1f} before and {after:.1f} after; "
        f"headspace {2 * rate / (before + after):.2f}, recorded {recorded:.2f}",
        flush=True,
    )
    return after


def parsed() -> argparse.Namespace:
    """The flags."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    for name in ("--model", "--data", "--slide"):
        parser.add_argument(name, required=True)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--protocol", default="case")
    parser.add_argument("--precision", default="float32")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    flags = parsed()
    card = bundle.read_card(flags.model)
    cluster.connect(several_trainings=True)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            data=flags.data,
            weights="none",
            architecture=card.architecture,
            protocol=flags.protocol,
            epochs=flags.epochs,
            precision=flags.precision,
            input_height_px=card.input_height_px,
            input_width_px=card.input_width_px,
            prepared=storage.join(folder, "prepared"),
            num_workers="1",
        )
        off = config.model_copy(update={"prepared": "off"})
        print(
            f"{card.input_height_px}x{card.input_width_px}, {card.architecture}, {flags.precision}",
            flush=True,
        )
        before = fed_rate(TRAINED, config.model_dump_json())
        for name, given, in_memory in (
            ("training from files", off, False),
            ("training from prepared images", config, False),
            ("training from memory", config, True),
        ):
            before = compared(
                name,
                before,
                lambda: fed_rate(TRAINED, config.model_dump_json()),
                lambda given=given, in_memory=in_memory: trained(given, flags.rows, in_memory),
            )
        score_all(flags, config, folder)


def score_all(flags: argparse.Namespace, config: TrainConfig, folder: str) -> None:
    """Measure and print scoring; the images of `config` have been prepared."""
    settings = predict.Settings(flags.model, bundle.identify(flags.model), flags.precision, timed=True)
    table, _ = prepare.prepare(config)
    located = prepare.located(table, prepare.store_of(config))
    tiles = tiles_of(flags.slide, flags.model, storage.join(folder, "plans"))
    pool, before = cluster.model_workers(1), 0.0
    for name, rows in (("files", table), ("prepared images", located), ("a slide", tiles)):
        given = repeated(schema.fill(rows, schema.READING), flags.rows)
        uri = storage.join(folder, f"{name.replace(' ', '-')}.parquet")
        storage.write_table(uri, given.slice(0, ROWS_PER_BLOCK))
        arguments = flags.model, flags.precision, uri, str(pool.threads)
        before = compared(
            f"scoring from {name}",
            before or fed_rate(SCORED, *arguments),
            lambda arguments=arguments: fed_rate(SCORED, *arguments),
            lambda given=given: scored(given, settings),
        )


if __name__ == "__main__":
    main()
