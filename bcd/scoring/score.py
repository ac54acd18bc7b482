"""Score an archive: every field and every tile of its slides once, resumable at any moment.

list inputs -> skip committed ones -> fields, and tiles of slides -> predictions -> segments
-> require completeness -> merge into the table -> slides, gallery -> summary
"""

import logging
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import Dataset

from bcd import lease, schema, storage
from bcd.audit import pseudonyms
from bcd.audit.pseudonyms import Pseudonyms
from bcd.config.options import AUTO, Engine, Role
from bcd.config.scoring import ScoreConfig
from bcd.data import archive
from bcd.errors import ConfigError, IncompleteError
from bcd.lease import Lease
from bcd.model import bundle
from bcd.model.card import Card
from bcd.model.engines.choice import OPENVINO, TORCH, choose_engine
from bcd.preflight import signing
from bcd.runtime import cluster, datasets, output, predict
from bcd.scoring import finish, inputs, ledger, tiling
from bcd.scoring.ledger import Done, Ledger
from bcd.scoring.progress import Progress
from bcd.slides import slide
from bcd.text import counted, some, without_folders

logger = logging.getLogger(__name__)

# That a worker reads and scores at a time; 15 MB of pixels at 224x336.
ROWS_PER_BLOCK = 64
# Of a segment, for each model worker: half a minute of work at 8 rows/s, the slowest measured.
ROWS_PER_SEGMENT = 256
# From these sizes on half a minute of compiling pays: in bfloat16 a CPU gains 14 % at 224x336.
COMPILE_FROM_FILES, COMPILE_FROM_SLIDE_BYTES = 20_000, 2**32

MPP_ERRORS = frozenset({"missing_mpp", "bad_mpp"})
# Of outputs of versions that did not have a flag yet.
FIELDS = {name: ScoreConfig.model_fields[name] for name in ScoreConfig.names(Role.OPERATIONAL)}
DEFAULTS = {name: field.default for name, field in FIELDS.items() if not field.is_required()}
DEFAULTS |= {"engine": TORCH}


@dataclass(frozen=True)
class Books:
    """Expected inputs (a field or a slide), and committed rows per input."""

    inputs: pa.Table
    older: Done
    done: Done
    plans: Mapping[str, tiling.Plan]

    def is_complete(self, name: str) -> bool:
        """Whether an input has all its rows."""
        if name in self.older.rows:
            return True
        expected = self.plans[name].tiles if name in self.plans else 1
        return self.done.rows[name] >= expected

    def open_inputs(self) -> pa.Table:
        """Inputs that lack rows."""
        names = self.inputs[schema.IMAGE_ID].to_pylist()
        return self.inputs.filter(pa.array([not self.is_complete(name) for name in names], pa.bool_()))


@dataclass(frozen=True)
class OpenedModel:
    """The model that the job began with: its card, its id, and the hash of a card that was verified."""

    card: Card
    id: str
    card_sha256: str | None


def run(config: ScoreConfig) -> str:
    """Score the inputs that are not scored yet, and return the URI of the output folder.

    Raises:
        BcdError: an error for the user, before any long work where possible.
        IncompleteError: inputs have neither a result nor an error.
    """
    started = time.monotonic()
    config, model, names = opened(config)
    with lease.held(config.output, config.wait) as held:
        return _fill(config, held, model, names, started)


def opened(config: ScoreConfig) -> tuple[ScoreConfig, OpenedModel, Pseudonyms | None]:
    """The settings with the revision of the model, the model, and the ids that replace names, if any: all
    checks before any work. Raises BcdError."""
    for flag, place in (("--output", config.output), ("--masks", config.masks)):
        if place is not None and storage.join(place, "").startswith(storage.join(config.input, "")):
            raise ConfigError(f"{flag} {place} is inside --input: its images would be scored too")
    names = _pseudonyms(config)
    output.read_marker(config.output, output.SCORE)
    config = config.model_copy(update={"model": storage.pinned(config.model)})
    card_sha256 = signing.verified(config.model, config.require_signature)
    model_id = bundle.identify(config.model, card_sha256)
    model = OpenedModel(bundle.read_same(config.model, model_id, card_sha256), model_id, card_sha256)
    model.card.cam(config.cam, config.cam_layer)
    return config, model, names


def _pseudonyms(config: ScoreConfig) -> Pseudonyms | None:
    """The ids that replace names, if any; raises ConfigError for a key that would be published."""
    if config.pseudonymise is None:
        return None
    for flag, folder in (("--output", config.output), ("--input", config.input)):
        if storage.absolute(config.pseudonymise).startswith(storage.join(folder, "")):
            raise ConfigError(
                f"--pseudonymise {config.pseudonymise} is inside {flag}: keep the key elsewhere"
            )
    return pseudonyms.read_key(config.pseudonymise)


def listed_inputs(config: ScoreConfig, names: Pseudonyms | None) -> tuple[archive.Archive, pa.Table]:
    """The inputs, under ids where names are hidden, and under their own names."""
    found = archive.list_inputs(config.input)
    for flag, uri, suffix, column in (
        ("--masks", config.masks, ".png", schema.MASK_FILES),
        ("--regions", config.regions, ".geojson", schema.REGION_FILES),
    ):
        found = found if uri is None else archive.with_files(found, flag, uri, suffix, column)
    if names is None:
        return found, found.table
    table, columns = names.table(found.table), (schema.URI, schema.ERROR, schema.ERROR_MESSAGE)
    messages = [ledger.discreet(*row) for row in zip(*(table[c].to_pylist() for c in columns), strict=True)]
    table = table.set_column(
        table.column_names.index(columns[2]), columns[2], pa.array(messages, pa.string())
    )
    order = pc.sort_indices(table, [(schema.IMAGE_ID, "ascending")])
    return replace(found, table=table.take(order), versions=found.versions.take(order)), found.table


def _fill(
    config: ScoreConfig, held: Lease, model: OpenedModel, names: Pseudonyms | None, started: float
) -> str:
    """Score what is missing in the output; `started` is when the job began."""
    found, named = listed_inputs(config, names)
    cluster.connect()
    config = config.model_copy(update={"engine": _engine(config, model.card)})
    compiled = _compiles(config, found.table)
    ours, summary = ledger.open_ledger(
        held, deciding(config, model.id, compiled, names), remedies_of(model.card), DEFAULTS
    )
    if names:
        logger.info(f"map of ids: {names.write_map(named, ours.owner)}")
    books, changed = _settled(ours, found, names)
    todo = books.open_inputs()
    if not len(todo) and summary and "incomplete" not in summary and not books.done.rows:
        n = counted(len(found.table), "input")
        logger.info(f"{ours.uri} is finished: {n}, all scored; see gallery.html there")
        return ours.uri
    _announce(found, todo)
    settings = _settings(config, model, compiled)
    progress = Progress(todo, ours.plans_uri, books.done)
    with predict.one_model(settings):
        rate = _score(
            ours, books, progress, todo, settings, tiling_of(config, model.card), config.max_workers
        )
    books = books_of(ours, found.table)
    _require_balance(books, progress.withheld)
    if books.plans:
        inputs.require_same_slides(found, listed_inputs(config, names)[0], books.plans)
    n_rows = sum(books.older.rows.values()) + _merge(ours, books.done)
    facts = _facts(config, model.card, model.id, names) | {
        "n_ignored_files": found.ignored,
        "ignored": {} if names else dict(found.passed.most_common()),
        "n_changed_inputs": len(changed),
        "rows_per_s": rate or None,
        "headspace": progress.headspace,
        "images_from": progress.images_from,
        "first_row_s": round(progress.first - started, 1) if progress.first else None,
        "seconds": round(time.monotonic() - started, 1),
    }
    ids, places = found.table[schema.IMAGE_ID], found.table.select([schema.IMAGE_ID, schema.URI])
    plans = list(books.plans.values())
    summary = finish.present(ours, plans, ids, settings, facts, places if names else None)
    ledger.close_ledger(ours, summary, n_rows)
    for line in finish.closing_lines(ours.uri, summary):
        logger.info(line)
    return ours.uri


def _settings(config: ScoreConfig, model: OpenedModel, compiled: bool) -> predict.Settings:
    decided = {"overlays": config.overlays == "png", "compile": compiled, "card_sha256": model.card_sha256}
    return predict.Settings.of(config, model.id, timed=True, **decided)


def tiling_of(config: ScoreConfig, card: Card) -> tiling.Tiling:
    """How the slides are cut."""
    given = config.model_dump(include={field.name for field in fields(tiling.Tiling)})
    given["tile_mpp"] = config.tile_mpp or max(card.mpp, default=None)
    size = {"tile_width_px": card.field_width_px, "tile_height_px": card.field_height_px}
    return tiling.Tiling(**given, **size, hides_uris=config.pseudonymise is not None)


def _facts(config: ScoreConfig, card: Card, model_id: str, names: Pseudonyms | None) -> dict[str, Any]:
    shown = {"title": f"Scored archive: {config.input}", "input": config.input}
    return {
        **({"title": "Scored archive", "pseudonyms": names.fingerprint} if names else shown),
        "model_id": model_id,
        "model": without_folders(config.model),
        **config.model_dump(include={"precision", "engine", "cam_layer"}),
        "cam": card.cam(config.cam, config.cam_layer),
        **{name: getattr(card, name) for name in ("target", "threshold", "synthetic", "leaky")},
    }


def _engine(config: ScoreConfig, card: Card) -> Engine:
    """What computes the network; fixed by the first run into an output, because rounding differs."""
    given: Engine = TORCH if config.engine == AUTO and config.compile == "on" else config.engine
    before = ledger.read_settings(config.output)
    if given == AUTO and before:
        given = before.get("engine", TORCH)
    has_gpus = cluster.total_resources()["GPU"] > 0
    method = card.cam(config.cam, config.cam_layer)
    return choose_engine(given, card.architecture, method, has_gpus)


def _compiles(config: ScoreConfig, inputs: pa.Table) -> bool:
    """Whether torch compiles the network; fixed by the first run into an output, because rounding differs."""
    if config.compile != "auto" or config.engine == OPENVINO:
        return config.compile == "on"
    before = ledger.read_settings(config.output) or {}
    if "compile" in before:
        return bool(before["compile"])
    files = zip(inputs[schema.URI].to_pylist(), inputs[schema.SIZE_BYTES].to_pylist(), strict=True)
    slide_bytes = sum(size or 0 for uri, size in files if uri.lower().endswith(slide.SLIDE_SUFFIXES))
    long = len(inputs) >= COMPILE_FROM_FILES or slide_bytes >= COMPILE_FROM_SLIDE_BYTES
    if not long or cluster.total_resources()["GPU"] > 0:
        return long
    return config.precision == "bfloat16" and shutil.which("g++") is not None


def deciding(config: ScoreConfig, model_id: str, compiled: bool, names: Pseudonyms | None) -> dict[str, Any]:
    """The settings that determine a row; model and key by their content, independent of their place."""
    settings = config.deciding()
    if names:
        places = {key: settings[key] for key in ("input", "masks", "regions")}
        settings |= {key: names.of(place) for key, place in places.items() if place is not None}
        settings["pseudonymise"] = names.fingerprint
    return settings | {"model": model_id, "compile": compiled}


def remedies_of(card: Card) -> ledger.Remedies:
    """Flags that resolve errors of slides; no slide with a result has used them."""
    remedies = {"mpp": MPP_ERRORS, "mpp_override": MPP_ERRORS | {"too_coarse"}}
    return remedies if card.mpp else remedies | {"tile_mpp": MPP_ERRORS}


def _settled(
    ours: Ledger, found: archive.Archive, names: Pseudonyms | None = None
) -> tuple[Books, list[str]]:
    """The committed rows, without those of changed inputs, and the ids of these inputs."""
    books = books_of(ours, found.table)
    changed = inputs.settle(ours, books.older, books.done, found, names)
    if changed:
        logger.info(f"{inputs.changed_text(changed, 'since the last run')}: scoring them again")
        books = books_of(ours, found.table)
    return books, changed


def books_of(ours: Ledger, listed: pa.Table) -> Books:
    """What is committed of the listed inputs, and the plans of slides."""
    done = ledger.committed(ours)
    uris = dict(zip(listed[schema.IMAGE_ID].to_pylist(), listed[schema.URI].to_pylist(), strict=True))
    possible = [name for name in done.rows if name in uris and tiling.may_be_slide(uris[name])]
    with ThreadPoolExecutor(storage.READ_THREADS) as pool:
        plans = list(pool.map(lambda name: tiling.read_plan(ours.plans_uri, name), possible))
    known = {name: plan for name, plan in zip(possible, plans, strict=True) if plan}
    return Books(listed, ledger.merged(ours), done, known)


def _require_balance(books: Books, withheld: str | None = None) -> None:
    """Raises IncompleteError if an input lacks rows; `withheld` is an error of storage."""
    if missing := books.open_inputs()[schema.IMAGE_ID].to_pylist():
        why = f" Storage failed to deliver some ({withheld}): is it up, and are the credentials valid?"
        raise IncompleteError(
            f"{len(missing):,} of {counted(len(books.inputs), 'input')} have neither a result nor an error, "
            f"first {missing[0]}. Run the same command again to resume.{why if withheld else ''}"
        )


def _announce(found: archive.Archive, todo: pa.Table) -> None:
    logger.info(summed_up(found, todo))
    if found.unclaimed:
        files = counted(len(found.unclaimed), "file") + f" ({some(found.unclaimed)})"
        logger.warning(f"of --masks and --regions, {files} have the name of no slide and are not used")


def summed_up(found: archive.Archive, todo: pa.Table) -> str:
    """The inputs, how many of them are scored, and what else is there, in a line."""
    line = counted(len(found.table), "input")
    if found.ignored:
        others = counted(found.ignored, "other entry is", "other entries are")
        line += f" ({others} not read: {archive.described(found.passed)})"
    if len(todo) < len(found.table):
        line += f"; {len(found.table) - len(todo):,} are already scored, resuming with {len(todo):,}"
    return line


def _score(
    ours: Ledger,
    books: Books,
    progress: Progress,
    todo: pa.Table,
    settings: predict.Settings,
    tile_settings: tiling.Tiling,
    max_workers: int | None,
) -> float:
    """Score and commit; returns rows per second."""
    if not len(todo):
        return 0.0
    pool = settings.workers(max_workers)
    started_slides = {name for name in todo[schema.IMAGE_ID].to_pylist() if books.done.rows[name]}
    done_tiles = ledger.tile_ids(books.done, started_slides)
    dataset = _reading(todo, tile_settings, ours.plans_uri, done_tiles)
    commits = predict.score_rows(dataset, settings, max_workers).map_batches(
        ledger.commit,
        fn_kwargs={"work_uri": ours.work_uri, "hides_uris": tile_settings.hides_uris},
        batch_size=ROWS_PER_SEGMENT * pool.size if settings.cam == "evidence" else ROWS_PER_BLOCK,
        batch_format="pyarrow",
        **cluster.beside_models(),
    )
    for batch in commits.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        progress.add(batch)
        if ledger.is_withheld(batch):
            break  # other rows would wait for storage one by one
    return progress.end()


def _reading(
    todo: pa.Table, tile_settings: tiling.Tiling, plans_uri: str, done_tiles: frozenset[str]
) -> Dataset:
    """Rows to read, in small blocks."""
    maybe = pa.array([tiling.may_be_slide(uri) for uri in todo[schema.URI].to_pylist()], pa.bool_())
    fields = schema.fill(todo.filter(pc.invert(maybe)), schema.READING)
    slides = todo.filter(maybe)
    sources, beside = [], cluster.beside_models()
    if len(fields):
        sources.append(datasets.row_dataset(fields, ROWS_PER_BLOCK, **beside))
    if len(slides):
        tiles = datasets.row_dataset(slides, 1, **beside).map_batches(
            tiling.expand,
            fn_kwargs={"tiling": tile_settings, "plans_uri": plans_uri, "done": done_tiles},
            batch_size=None,
            batch_format="pyarrow",
            **beside,
        )
        sources.append(tiles.repartition(target_num_rows_per_block=ROWS_PER_BLOCK))
    return sources[0].union(*sources[1:]) if len(sources) > 1 else sources[0]


def _merge(ours: Ledger, done: Done) -> int:
    """Merge the segments into the table; returns the number of rows."""
    ours.lease.require()
    task = ray.remote(num_cpus=1, max_retries=-1)(ledger.merge)
    written = ray.get([task.remote(part) for part in ledger.cut_parts(ours, done)])
    if sum(written) < len(done.rows):
        raise IncompleteError(f"{sum(written):,} rows were merged for {len(done.rows):,} inputs")
    return sum(written)
