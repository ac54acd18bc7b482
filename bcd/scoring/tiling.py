"""From inputs to rows for the network: a field is one row, a slide one row per tile with tissue."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from bcd import schema, storage
from bcd.data import read
from bcd.errors import StorageError
from bcd.imaging import decoder, image
from bcd.slides import pixel_size, slide, slide_cache, tile, tissue
from bcd.text import counted


@dataclass(frozen=True)
class Tiling:
    """How slides are cut. A tile has the size of a training field, in pixels and in µm.

    mpp applies to slides that state none, mpp_override to all; min_tissue is a share of a tile's area. With
    `hides_uris`, plans name a slide by its id only.
    """

    tile_mpp: float | None
    tile_width_px: int
    tile_height_px: int
    mpp: float | None
    min_tissue: float
    mpp_override: float | None = None
    hides_uris: bool = False

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
    reader: str | None = None


def expand(batch: pa.Table, tiling: Tiling, plans_uri: str, done: frozenset[str]) -> Iterator[pa.Table]:
    """Rows of `schema.READING` for rows of `schema.INPUTS`, without tiles whose ids are in `done`.

    A slide that cannot be read gives one row with its error. Plan and thumbnail of every other slide are
    written to `plans_uri`.
    """
    for row in batch.to_pylist():
        try:
            yield _expanded(row, tiling, plans_uri, done)
        except image.ImageError as error:
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
    opened, _ = slide_cache.open_staged(row[schema.URI], tiling.given(row))
    if tiling.tile_mpp is None:
        raise image.ImageError("missing_mpp", "the model card has no µm per pixel; --tile-mpp gives it")
    opened.level_for(tiling.tile_mpp)  # raises for a scan too coarse for the model
    size, mpp = (opened.width_px, opened.height_px), (opened.mpp_x, opened.mpp_y)
    grid = tile.grid(*size, mpp, tiling.tile_mpp, tiling.tile_width_px, tiling.tile_height_px)
    thumbnail, scale = opened.thumbnail()
    mask = tissue.mask(thumbnail)
    share = tissue.fraction(mask, grid.boxes(scale))
    chosen = grid.near(np.flatnonzero((share >= tiling.min_tissue) & (share > 0)))
    if not len(chosen):
        tiles = counted(len(grid), "tile")
        message = f"no tissue to score in {tiles}; --min-tissue is {tiling.min_tissue:g}"
        raise image.ImageError("no_tissue", message)
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
        background_tiles=len(grid) - len(chosen),
        tissue_area_mm2=float(mask.sum()) * opened.mpp_x * opened.mpp_y / (scale * 1_000) ** 2,
        thumbnail_scale=scale,
        reader=opened.reader.facts.reader,
    )
    tiles = _tile_rows(plan, grid, chosen, tiling.tile_mpp, tiling)
    _keep(plans_uri, plan, thumbnail, tiles)
    return tiles


def _tile_rows(plan: Plan, grid: tile.Grid, chosen: np.ndarray, tile_mpp: float, tiling: Tiling) -> pa.Table:
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
    columns = {schema.IMAGE_ID: ids, schema.X_LEVEL0_PX: x, schema.Y_LEVEL0_PX: y}
    columns |= {name: [value] * len(ids) for name, value in constant.items()}
    return schema.fill(pa.table(columns), schema.READING)


def _key(slide_id: str) -> str:
    return hashlib.sha256(slide_id.encode()).hexdigest()[:24]


def _uri(plans_uri: str, slide_id: str, suffix: str) -> str:
    return storage.join(plans_uri, f"{_key(slide_id)}.{suffix}")


def _keep(plans_uri: str, plan: Plan, thumbnail: np.ndarray, tiles: pa.Table) -> None:
    """Write the tiles last: they exist only with plan and thumbnail, and a plan only with a thumbnail."""
    storage.write_bytes(_uri(plans_uri, plan.slide, "png"), image.encode_png(thumbnail))
    storage.write_bytes(_uri(plans_uri, plan.slide, "json"), plan.model_dump_json().encode())
    storage.write_table(_uri(plans_uri, plan.slide, "parquet"), tiles)


def _read_tiles(plans_uri: str, slide_id: str) -> pa.Table | None:
    """All tiles of a planned slide (schema `schema.READING`); None without a plan."""
    uri = _uri(plans_uri, slide_id, "parquet")
    return schema.fill(storage.read_table(uri), schema.READING) if storage.exists(uri) else None


def forget(plans_uri: str, slide_id: str) -> None:
    """Remove the plan of a changed slide; the tiles first, because they make the plan valid."""
    for suffix in ("parquet", "json", "png"):
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
