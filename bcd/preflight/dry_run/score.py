"""What a scoring job would do: inputs, those that are done, how many tiles the slides may have, time."""

from dataclasses import replace
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from bcd import schema, storage
from bcd.config.scoring import ScoreConfig
from bcd.data.archive import Archive
from bcd.errors import ImageError
from bcd.lease import Lease
from bcd.model import predictor
from bcd.model.predictor import Predictor
from bcd.preflight.dry_run import measure, page
from bcd.preflight.dry_run.measure import Pace, Read
from bcd.runtime import cluster, output
from bcd.scoring import inputs, ledger, score, tiling
from bcd.scoring.ledger import Done
from bcd.scoring.score import Books
from bcd.slides import slide_cache
from bcd.text import counted, duration, size

# Slides that are opened to estimate the number of tiles.
OPENED = 2
# Bytes of a row besides its map: ids, numbers and an error, compressed; and of its image under the map.
ROW_BYTES, OVERLAY_BYTES = 300, 100_000


class Todo(NamedTuple):
    """What is to be scored: rows of fields, tiles of slides that were opened, how many tiles there may be in
    all, and lines about slides."""

    fields: pa.Table
    tiles: pa.Table
    n_tiles: int
    lines: list[str]

    @property
    def n_rows(self) -> int:
        """Rows that would be written."""
        return len(self.fields) + self.n_tiles


def run(config: ScoreConfig) -> list[str]:
    """Log the lines of a dry run, and return them; raises BcdError as the job would before its work."""
    config, model, names = score.opened(config)
    found, _ = score.listed_inputs(config, names)
    left = ledger.read_settings(config.output) or {}
    compiled = config.compile == "on" or (config.compile == "auto" and bool(left.get("compile")))
    settings = score.deciding(config, model.id, compiled, names)
    added = ledger.added_settings(config.output, settings, score.remedies_of(model.card), score.DEFAULTS)
    books = _books(config, found.table)
    open_inputs = books.open_inputs()
    lines = [score.summed_up(found, open_inputs), *_doubts(config, found, books, added or [])]
    if not len(open_inputs):
        return page.show([*lines, "nothing is left to score"])
    how = replace(score.tiling_of(config, model.card), hides_uris=False)
    todo = _todo(open_inputs, books, how)
    lines += [f"to read: {size(page.n_bytes(open_inputs))}; of slides only the parts that are scored"]
    loaded = predictor.load(config.model, precision=config.precision, card_sha256=model.card_sha256)
    lines += [*todo.lines, page.model_line(model.card, config.batch_size), _space(config, loaded, todo)]
    return page.show([*lines, *_time_lines(config, loaded, todo)])


def _books(config: ScoreConfig, listed: pa.Table) -> Books:
    """What is committed; only read."""
    owner = output.read_marker(config.output, output.SCORE)
    if owner is None:
        return Books(listed, Done(), Done(), {})
    return score.books_of(ledger.as_left(Lease(config.output), owner)[0], listed)


def _doubts(config: ScoreConfig, found: Archive, books: Books, added: list[str]) -> list[str]:
    """Why rows that are there may be scored again."""
    lines = []
    if added:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in added)
        lines.append(f"slides with errors that {flags} may resolve are scored again, too")
    uri = storage.join(config.output, inputs.FILE)
    if config.pseudonymise is None and storage.exists(uri):
        seen = storage.read_table(uri, [schema.IMAGE_ID, schema.VERSION])
        before = dict(zip(*(seen[name].to_pylist() for name in seen.column_names), strict=True))
        now = zip(found.table[schema.IMAGE_ID].to_pylist(), found.versions.to_pylist(), strict=True)
        if n := sum(name in before and before[name] != version for name, version in now):
            lines.append(
                f"{counted(n, 'file')} may have changed: the job compares their bytes with their rows"
            )
    return lines


def _todo(open_inputs: pa.Table, books: Books, how: tiling.Tiling) -> Todo:
    """The rows; the tiles of slides without a plan by those of `OPENED` of them."""
    maybe = pa.array([tiling.may_be_slide(uri) for uri in open_inputs[schema.URI].to_pylist()], pa.bool_())
    fields, slides = open_inputs.filter(pc.invert(maybe)), open_inputs.filter(maybe)
    known = [name for name in slides[schema.IMAGE_ID].to_pylist() if name in books.plans]
    planned = sum(books.plans[name].tiles - books.done.rows[name] for name in known)
    slides = slides.filter(pc.invert(pc.is_in(slides[schema.IMAGE_ID], pa.array(known, pa.string()))))
    if not len(slides):
        return Todo(fields, schema.READING.empty_table(), planned, [])
    here = [row for row in slides.to_pylist() if not storage.is_remote(row[schema.URI])][:OPENED]
    tables, lines = [], []
    for row in here:
        try:
            tables.append(_tiles(row, how))
        except ImageError as error:
            lines.append(f"{row[schema.IMAGE_ID]}: {error.code}: {error.message}")
    if not tables:
        why = "could be opened" if here else "is on this machine"
        lines.append(f"{counted(len(slides), 'slide')}: the number of tiles is not known, as none {why}")
        return Todo(fields, schema.READING.empty_table(), planned, lines)
    n = round(len(slides) * sum(map(len, tables)) / len(tables))
    lines.append(
        f"estimate: about {counted(n, 'tile')} with tissue in {counted(len(slides), 'slide')}, by the first "
        f"{len(tables)} of them"
    )
    return Todo(fields, pa.concat_tables(tables), planned + n, lines)


def _tiles(row: dict[str, object], how: tiling.Tiling) -> pa.Table:
    """Rows of a slide, or of a file that is a field after all."""
    if not slide_cache.is_slide_at(str(row[schema.URI]), how.given(row)):
        return schema.fill(pa.Table.from_pylist([row]), schema.READING)
    return tiling.planned(row, how)[2]


def _space(config: ScoreConfig, model: Predictor, todo: Todo) -> str:
    height, width = model.evidence_size(config.cam_layer)
    of_row = ROW_BYTES + 4 * height * width + OVERLAY_BYTES * (config.overlays == "png")
    of_row += 2 * model.network.fc.in_features * config.embeddings
    needed = f"{todo.n_rows:,} rows with maps of {height}x{width} need about {size(todo.n_rows * of_row)}"
    return f"estimate: {needed}; {page.free_space(config.output)}"


def _time_lines(config: ScoreConfig, model: Predictor, todo: Todo) -> list[str]:
    samples = [
        (measure.read_sample(rows, *model.card.input_size_px), n, what)
        for rows, n, what in ((todo.fields, len(todo.fields), "field"), (todo.tiles, todo.n_tiles, "tile"))
        if len(rows)
    ]
    if not samples:
        return ["no estimate of the time: nothing could be read"]
    pace = measure.scoring_pace(model, samples[0][0].images, config.batch_size, config.cam, config.cam_layer)
    cores = cluster.cores()
    lines = [f"estimates in this process, for one model on {pace.device}:"]
    lines += [_reading(sample, n, what, cores) for sample, n, what in samples]
    read = sum(n * sample.seconds for sample, n, _ in samples) / cores
    predicted = todo.n_rows * pace.forward
    return [
        *lines,
        f"  predicting {counted(todo.n_rows, 'row')}: about {duration(predicted)} "
        f"({1_000 * pace.forward:.0f} ms a row, not compiled)",
        f"  all: about {duration(_together(pace, read, predicted))}, and the start of Ray",
    ]


def _reading(sample: Read, n: int, what: str, cores: int) -> str:
    seconds = n * sample.seconds / cores
    return (
        f"  reading {counted(n, what)}: about {duration(seconds)} on {counted(cores, 'CPU')} "
        f"({1_000 * sample.seconds:.0f} ms each, {page.of_sample(sample)})"
    )


def _together(pace: Pace, read: float, predicted: float) -> float:
    """Seconds of reading and predicting, which share the CPUs, or do not where there is a GPU."""
    return max(read, predicted) if pace.is_gpu else read + predicted
