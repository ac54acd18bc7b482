"""From inputs to rows for the network: a field is one row, a slide one row per tile with tissue."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from bcd import schema, storage
from bcd.data import read
from bcd.errors import ImageError, StorageError
from bcd.imaging import decoder, image
from bcd.slides import pixel_size, regions, slide, slide_cache, tile, tissue
from bcd.text import counted

# In the image of the masks of a slide; and the share of a pixel that counts as all of it.
TISSUE_BIT, REGION_BIT, MOST = 1, 2, 0.5


@dataclass(frozen=True)
class Tiling:
    """How slides are cut. A tile has the size of a training field, in pixels and in µm.

    mpp applies to slides that state none, mpp_override to all; min_tissue and min_region are shares of a
    tile's area, and neighbours share `tile_overlap` of a side. With `hides_uris`, plans name a slide by its
    id only, and regions not at all.
    """

    tile_mpp: float | None
    tile_width_px: int
    tile_height_px: int
    mpp: float | None
    min_tissue: float
    mpp_override: float | None = None
    hides_uris: bool = False
    tile_overlap: float = 0.0
    min_region: float = 0.5

    def given(self, row: dict[str, Any]) -> pixel_size.Given:
        """The µm per pixel that is given for a slide, a row of `schema.INDEX`."""
        both = (self.mpp_override, self.mpp_override) if self.mpp_override else None
        return pixel_size.Given(row[schema.MPP], self.mpp, both)


class Plan(BaseModel):
    """Facts about a slide, known before its tiles are scored; see `schema.SLIDES`."""

    slide: str
    uri: str
    patient: str | None
    width_px: int
    height_px: int
    mpp_x: float
    mpp_y: float
    tiles: int
    background_tiles: int
    tissue_area_mm2: float
    thumbnail_scale: float
    bounds_x_px: int = 0
    bounds_y_px: int = 0
    outside_tiles: int = 0
    reader: str | None = None


@dataclass(frozen=True)
class _Seen:
    """A slide on its thumbnail of `scale` pixels per level-0 pixel: the share of tissue in each pixel, bool
    or float (h, w), and the regions of interest."""

    thumbnail: np.ndarray
    scale: float
    tissue: np.ndarray
    drawn: regions.Regions | None

    @cached_property
    def inside(self) -> np.ndarray:
        """The share of each pixel within a region, float64 (h, w)."""
        return self.drawn.mask() if self.drawn else np.ones(self.tissue.shape)


def expand(batch: pa.Table, tiling: Tiling, plans_uri: str, done: frozenset[str]) -> Iterator[pa.Table]:
    """Rows of `schema.READING` for rows of `schema.INPUTS`, without tiles whose ids are in `done`.

    Files of masks and regions are in columns of their own (`archive.with_files`). A slide that cannot be read
    gives one row with its error. Plan and thumbnail of every other slide are written to `plans_uri`.
    """
    for row in batch.to_pylist():
        try:
            yield _expanded(row, tiling, plans_uri, done)
        except ImageError as error:
            broken = {schema.SLIDE: row[schema.IMAGE_ID], schema.ERROR: error.code}
            yield _reading(row | broken | {schema.ERROR_MESSAGE: error.message})


def may_be_slide(uri: str) -> bool:
    """Whether a file must be opened to know its number of rows."""
    return not uri.lower().endswith(slide.FIELD_SUFFIXES)


def _expanded(row: dict[str, Any], tiling: Tiling, plans_uri: str, done: frozenset[str]) -> pa.Table:
    if row.get(schema.ERROR) or not may_be_slide(row[schema.URI]):
        return _reading(row)
    try:
        # Tiles of a planned slide may be committed, so its plan is used; `forget` removes outdated ones.
        tiles = _read_tiles(plans_uri, row[schema.IMAGE_ID])
        if tiles is None and not slide_cache.is_slide_at(row[schema.URI], tiling.given(row)):
            return _reading(row)
        tiles = _tiles(row, tiling, plans_uri) if tiles is None else tiles
        tiles = tiles.filter(pc.invert(pc.is_in(tiles[schema.IMAGE_ID], pa.array(done, pa.string()))))
        place = pa.array([row[schema.URI]] * len(tiles), pa.string())  # which the plan may not contain
        return tiles.set_column(tiles.column_names.index(schema.URI), schema.READING.field(schema.URI), place)
    except StorageError as error:
        raise read.withheld(error) from error


def _reading(row: dict[str, Any]) -> pa.Table:
    own = {name: row.get(name) for name in schema.READING.names}
    return pa.Table.from_pylist([own], schema=schema.READING)


def _tiles(row: dict[str, Any], tiling: Tiling, plans_uri: str) -> pa.Table:
    """Plan a slide, and write the plan."""
    plan, seen, tiles = planned(row, tiling)
    _keep(plans_uri, plan, seen, tiles)
    return tiles


def planned(row: dict[str, Any], tiling: Tiling) -> tuple[Plan, _Seen, pa.Table]:
    """The plan of a slide, a row of `schema.INPUTS`, what was seen of it, and its tiles (schema
    `schema.READING`). Raises ImageError and StorageError."""
    opened, _ = slide_cache.open_staged(row[schema.URI], tiling.given(row))
    if tiling.tile_mpp is None:
        raise ImageError("missing_mpp", "the model card has no µm per pixel; --tile-mpp gives it")
    opened.level_for(tiling.tile_mpp)  # raises for a scan too coarse for the model
    size, mpp = (opened.width_px, opened.height_px), (opened.mpp_x, opened.mpp_y)
    tile_size = tiling.tile_width_px, tiling.tile_height_px
    grid = tile.grid(*size, mpp, tiling.tile_mpp, *tile_size, tiling.tile_overlap)
    seen = _look(row, opened)
    boxes = grid.boxes(seen.scale)
    share = tissue.fraction(seen.tissue, boxes)
    inside = tissue.fraction(seen.inside, boxes) if seen.drawn else np.ones(len(grid))
    within = (inside >= tiling.min_region) & (inside > 0)
    chosen = grid.near(np.flatnonzero(within & (share >= tiling.min_tissue) & (share > 0)))
    if not len(chosen):
        raise _nothing_to_score(len(grid), int(within.sum()), tiling)
    plan = Plan(
        slide=row[schema.IMAGE_ID],
        uri=row[schema.IMAGE_ID] if tiling.hides_uris else row[schema.URI],
        patient=row[schema.PATIENT],
        width_px=opened.width_px,
        height_px=opened.height_px,
        mpp_x=opened.mpp_x,
        mpp_y=opened.mpp_y,
        bounds_x_px=opened.bounds_x_px,
        bounds_y_px=opened.bounds_y_px,
        tiles=len(chosen),
        background_tiles=int(within.sum()) - len(chosen),
        outside_tiles=len(grid) - int(within.sum()),
        tissue_area_mm2=float((seen.tissue * seen.inside).sum()) * math.prod(mpp) / (seen.scale * 1_000) ** 2,
        thumbnail_scale=seen.scale,
        reader=opened.reader.facts.reader,
    )
    unnamed: list[str | None] = [None] * len(chosen)
    names = seen.drawn.names_of(boxes[chosen]) if seen.drawn and not tiling.hides_uris else unnamed
    content = {schema.TISSUE_SHARE: share[chosen], schema.REGION: pa.array(names, pa.string())}
    return plan, seen, _tile_rows(plan, grid, chosen, tiling.tile_mpp, tiling, content)


def _look(row: dict[str, Any], opened: slide.Slide) -> _Seen:
    """Thumbnail, tissue and regions of a slide. Raises ImageError, and StorageError for files beside it."""
    thumbnail, scale = opened.thumbnail()
    size, bounds = (opened.width_px, opened.height_px), (opened.bounds_x_px, opened.bounds_y_px)
    shape, drawn = thumbnail.shape[:2], None
    if uri := _file_beside(row, schema.REGION_FILES):
        with _naming(uri):
            content = storage.read_bytes(uri, regions.MAX_BYTES)
            drawn = regions.read_regions(content, size, bounds, shape, scale)
    if (uri := _file_beside(row, schema.MASK_FILES)) is None:
        return _Seen(thumbnail, scale, tissue.mask(thumbnail), drawn)
    with _naming(uri):
        given = tissue.given_mask(storage.read_bytes(uri, image.MAX_FILE_BYTES), size, bounds, shape)
    return _Seen(thumbnail, scale, given, drawn)


def _file_beside(row: dict[str, Any], column: str) -> str | None:
    """The URI of the one file of a slide; None where no flag asks for any."""
    uris = row.get(column)
    if uris is None:
        return None
    flag, name = {schema.MASK_FILES: ("masks", "mask"), schema.REGION_FILES: ("regions", "regions")}[column]
    if not uris:
        raise ImageError(
            f"no_{name}",
            f"--{flag} has no file with the name of this slide, or one that another slide has, too; add it, "
            f"or score the slide without --{flag} into another --output",
        )
    if len(uris) > 1:
        raise ImageError(f"bad_{name}", f"--{flag} has several files for this slide, {uris}; keep one")
    return str(uris[0])


@contextmanager
def _naming(uri: str) -> Iterator[None]:
    """Name the file beside a slide in its errors."""
    try:
        yield
    except ImageError as error:
        raise ImageError(error.code, f"{uri}: {error.message}") from None


def _nothing_to_score(n_tiles: int, n_within: int, tiling: Tiling) -> ImageError:
    if not n_within:
        where = f"none of {counted(n_tiles, 'tile')} is in a region"
        return ImageError("no_regions", f"{where}; --min-region is {tiling.min_region:g}")
    message = f"no tissue to score in {counted(n_within, 'tile')}; --min-tissue is {tiling.min_tissue:g}"
    return ImageError("no_tissue", message)


def _tile_rows(
    plan: Plan,
    grid: tile.Grid,
    chosen: np.ndarray,
    tile_mpp: float,
    tiling: Tiling,
    content: Mapping[str, np.ndarray | pa.Array],
) -> pa.Table:
    x, y = grid.x_level0_px[chosen], grid.y_level0_px[chosen]
    ids = [tile.tile_id(plan.slide, *place, tile_mpp) for place in zip(x, y, strict=True)]
    constant = {
        schema.URI: plan.uri,
        schema.SLIDE: plan.slide,
        schema.PATIENT: plan.patient,
        schema.SLIDE_MPP_X: plan.mpp_x,
        schema.SLIDE_MPP_Y: plan.mpp_y,
        schema.MPP: tile_mpp,
        schema.WIDTH_PX: tiling.tile_width_px,
        schema.HEIGHT_PX: tiling.tile_height_px,
    }
    columns = {schema.IMAGE_ID: ids, schema.X_LEVEL0_PX: x, schema.Y_LEVEL0_PX: y, **content}
    columns |= {name: pa.repeat(value, len(ids)) for name, value in constant.items()}
    return schema.fill(pa.table(columns), schema.READING)


def _key(slide_id: str) -> str:
    return hashlib.sha256(slide_id.encode()).hexdigest()[:24]


def _uri(plans_uri: str, slide_id: str, suffix: str) -> str:
    return storage.join(plans_uri, f"{_key(slide_id)}.{suffix}")


def _keep(plans_uri: str, plan: Plan, seen: _Seen, tiles: pa.Table) -> None:
    """Write the tiles last: they exist only with plan and thumbnail, and a plan only with a thumbnail."""
    bits = TISSUE_BIT * (seen.tissue >= MOST) + REGION_BIT * (seen.inside >= MOST) * bool(seen.drawn)
    storage.write_bytes(_uri(plans_uri, plan.slide, "png"), image.encode_png(seen.thumbnail))
    storage.write_bytes(_uri(plans_uri, plan.slide, "mask.png"), image.encode_png(bits.astype(np.uint8)))
    storage.write_bytes(_uri(plans_uri, plan.slide, "json"), plan.model_dump_json().encode())
    storage.write_table(_uri(plans_uri, plan.slide, "parquet"), tiles)


def _read_tiles(plans_uri: str, slide_id: str) -> pa.Table | None:
    """All tiles of a planned slide (schema `schema.READING`); None without a plan."""
    uri = _uri(plans_uri, slide_id, "parquet")
    return schema.fill(storage.read_table(uri), schema.READING) if storage.exists(uri) else None


def forget(plans_uri: str, slide_id: str) -> None:
    """Remove the plan of a changed slide; the tiles first, because they make the plan valid."""
    for suffix in ("parquet", "json", "mask.png", "png"):
        uri = _uri(plans_uri, slide_id, suffix)
        if storage.exists(uri):
            storage.delete_file(uri)


def read_plan(plans_uri: str, slide_id: str) -> Plan | None:
    """The plan of a slide, or None without one."""
    uri = _uri(plans_uri, slide_id, "json")
    return Plan.model_validate_json(storage.read_bytes(uri)) if storage.exists(uri) else None


def read_thumbnail(plans_uri: str, slide_id: str) -> np.ndarray:
    """uint8 (h, w, 3) RGB of a planned slide."""
    return decoder.decode_safely(storage.read_bytes(_uri(plans_uri, slide_id, "png")))


def read_masks(plans_uri: str, slide_id: str) -> tuple[np.ndarray, np.ndarray]:
    """Where most of a pixel of the thumbnail is tissue, and where most is in a region: bool (h, w) each. The
    second is False everywhere without regions."""
    uri = _uri(plans_uri, slide_id, "mask.png")
    if not storage.exists(uri):  # planned by an older version
        found = tissue.mask(read_thumbnail(plans_uri, slide_id))
        return found, np.zeros_like(found)
    bits = decoder.decode_safely(storage.read_bytes(uri))[..., 0]
    return bits & TISSUE_BIT > 0, bits & REGION_BIT > 0
