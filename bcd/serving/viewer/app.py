"""The viewer's interface as a Starlette app: pages without data, and below `/v1/view` the data of an output.

Callers name slides and fields by the ids of the table, and the output of a slide that they have sent to a
service by the id of that (`job`). Authentication and limits are `middleware.Guard`'s.
"""

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from bcd import provenance, schema
from bcd.data import read
from bcd.errors import StorageError
from bcd.imaging.image import ImageError
from bcd.model import card
from bcd.reports import heatmap, overlay
from bcd.scoring import ledger
from bcd.serving import front
from bcd.serving.receive import RefusedError
from bcd.serving.viewer import listing, packed, scored
from bcd.serving.viewer.deepzoom import OVERLAP_PX, TILE_PX, DeepZoom
from bcd.serving.viewer.listing import Query
from bcd.serving.viewer.pixels import BoundedThreads, PixelReader
from bcd.serving.viewer.scored import Outputs, Scored
from bcd.taxonomy import classes
from bcd.text import without_folders

logger = logging.getLogger(__name__)

# Where the data are, and the option that names the output of a slide that was sent.
PREFIX, JOB = "/v1/view", "job"
# For an hour in the caller's own browser, and for its token: addresses contain the version of the output.
CACHED = {"Cache-Control": "private, max-age=3600", "Vary": "Authorization"}
HIDDEN = "the output is pseudonymised: it does not name the files, so that only maps and numbers can be shown"
UNREADABLE = "the file is missing, damaged or forbidden, or the storage does not deliver it now"
# Packed tiles of slides, and pages of the list, that several may ask for.
KEPT_SLIDES, KEPT_PAGES = 4, 64
# Columns of a slide's row that the page shows.
SHOWN = [name for name in schema.SLIDES.names if name not in (schema.URI, schema.ERROR_MESSAGE)]


class Viewer:
    """The routes over outputs."""

    def __init__(self, outputs: Outputs, pixels: PixelReader) -> None:
        self._outputs, self._pixels = outputs, pixels
        # One at a time: each holds a batch of the table.
        self._tables = BoundedThreads("table", 1)
        self._packed = lru_cache(KEPT_SLIDES)(_packed)
        self._page = lru_cache(KEPT_PAGES)(listing.page)

    def routes(self) -> list[Route]:
        """Those of the data."""
        data: Mapping[str, Callable[[Request], Any]] = {
            "": self.about,
            "/inputs": self.inputs,
            "/input": self.input,
            "/tiles": self.tiles,
            "/image": self.image,
            "/heatmap": self.heat_map,
            "/pixels/{level:int}/{column:int}_{row:int}": self.tile,
        }
        return [Route(f"{PREFIX}{path}", self._checked(answer)) for path, answer in data.items()]

    def _checked(self, answer: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """The same answer; but where it lacks a file, because its slide was deleted, that is the error."""

        async def answered(request: Request) -> Response:
            try:
                return await answer(request)
            except (ImageError, StorageError):
                if job_id := request.query_params.get(JOB):
                    await self._outputs.find_again(job_id)
                raise

        return answered

    async def _output(self, request: Request) -> Scored:
        """The output that a request names."""
        return await self._outputs.find(request.query_params.get(JOB))

    async def about(self, request: Request) -> Response:
        """What the output is: counts, threshold and scale."""
        return JSONResponse(_about(await self._output(request)))

    async def inputs(self, request: Request) -> Response:
        """A page of the list of slides or fields."""
        query, output = _query(request), await self._output(request)
        found = await self._tables.run(self._page, output, query)
        return JSONResponse({"total": found.total, "rows": found.rows})

    async def input(self, request: Request) -> Response:
        """All facts of one slide or field."""
        name, output = _name(request), await self._output(request)
        if slide := output.slide(name):
            return JSONResponse(_slide(slide, output))
        field = scored.require(await self._tables.run(output.field, name))
        return JSONResponse(_field(field, output))

    async def tiles(self, request: Request) -> Response:
        """The tiles of a slide, see `packed`."""
        name, output = _name(request), await self._output(request)
        scored.require(output.slide(name))
        content = await self._tables.run(self._packed, output, name)
        return Response(content, media_type="application/octet-stream")

    async def tile(self, request: Request) -> Response:
        """Pixels of a slide: one tile of the deep-zoom image."""
        name, output = _name(request), await self._output(request)
        row = _readable(output, output.slide(name))
        at = (request.path_params[key] for key in ("level", "column", "row"))
        content = await self._pixels.tile(row, output.version, *at)
        return Response(content, media_type="image/jpeg", headers=CACHED)

    async def image(self, request: Request) -> Response:
        """Pixels of a field."""
        name, output = _name(request), await self._output(request)
        row = _readable(output, await self._tables.run(output.field, name))
        return Response(await self._pixels.field(row), media_type="image/jpeg", headers=CACHED)

    async def heat_map(self, request: Request) -> Response:
        """The heat map of a slide from the output."""
        name, output = _name(request), await self._output(request)
        scored.require(output.slide(name))
        content = await self._tables.run(output.heat_map, name)
        return Response(content, media_type="image/png", headers=CACHED)


def create_viewer(outputs: Outputs, pixels: PixelReader | None = None) -> Starlette:
    """An app of the viewer, with its pages."""
    page = Mount("/page", StaticFiles(directory=str(files("bcd.serving").joinpath("page"))))
    first = Route("/", lambda _: RedirectResponse("/slides"))
    health = Route("/healthz", lambda _: JSONResponse({"status": "alive"}))
    routes = [*Viewer(outputs, pixels or PixelReader()).routes(), *front.viewer_pages()]
    handlers = {RefusedError: _refused, ImageError: _broken, StorageError: _broken, HTTPException: _http}
    return Starlette(routes=[*routes, page, first, health], exception_handlers=handlers)


def _readable(output: Scored, row: dict[str, Any] | None) -> dict[str, Any]:
    found = scored.require(row)
    if not output.has_pixels:
        raise RefusedError(404, "no_pixels", HIDDEN)
    if found[schema.ERROR]:
        raise ImageError(found[schema.ERROR], found[schema.ERROR_MESSAGE] or "it was not scored")
    return found


def _packed(output: Scored, name: str) -> bytes:
    row = scored.require(output.slide(name))
    mpp = row[schema.MPP] or 1, row[schema.MPP_Y] or 1
    return packed.pack(output.tiles(name), mpp, classes(output.summary["target"]))


def _about(output: Scored) -> dict[str, Any]:
    summary = output.summary
    facts = (
        "title",
        "model_id",
        "threshold",
        "target",
        "synthetic",
        "leaky",
        "n_images",
        "n_slides",
        "errors",
    )
    return {
        **{name: summary.get(name) for name in facts},
        "title": without_folders(summary.get("title") or "Scored archive"),
        "version": provenance.own_version(),
        "output_version": output.version,
        "hidden": None if output.has_pixels else HIDDEN,
        "map": {
            "colors": [_hex(color) for color in heatmap.COLORS(np.arange(heatmap.COLORS.N))],
            "strength": heatmap.STRENGTH,
            "contrast": heatmap.CONTRAST,
            "edge": heatmap.EDGE,
            "hatch": heatmap.HATCH,
        },
        "overlay": {
            "limit": overlay.LIMIT,
            "against_colour": overlay.BLUE,
            "towards_colour": overlay.VERMILION,
            "opacity": overlay.OPACITY,
            "contrast": overlay.CONTRAST,
        },
    }


def _hex(color: np.ndarray) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in color[:3])


def _slide(row: dict[str, Any], output: Scored) -> dict[str, Any]:
    levels = DeepZoom(row[schema.WIDTH_PX] or 1, row[schema.HEIGHT_PX] or 1)
    zoom = {"tile": TILE_PX, "overlap": OVERLAP_PX, "last": levels.last}
    about = {"error_message": _message(row), "deep_zoom": zoom, "output_version": output.version}
    return {"kind": "slide", **{name: row[name] for name in SHOWN}, **about}


def _field(row: dict[str, Any], output: Scored) -> dict[str, Any]:
    hidden = (schema.URI, schema.LOGIT, schema.EVIDENCE, schema.ERROR_MESSAGE)
    facts = {name: value for name, value in row.items() if name not in hidden}
    more = {"error_message": _message(row), "log_odds": None, "output_version": output.version}
    return {"kind": "field", **facts, **more, "explained": _explained(row, output)}


def _explained(row: dict[str, Any], output: Scored) -> dict[str, Any] | None:
    """Log-odds and evidence map of a field, and the part of the map that covers it."""
    if row[schema.EVIDENCE] is None:
        return None
    height, width = row[schema.EVIDENCE_HEIGHT], row[schema.EVIDENCE_WIDTH]
    size = row[schema.HEIGHT_PX], row[schema.WIDTH_PX]
    covers = overlay.covers(*size, height * card.STRIDE_PX, width * card.STRIDE_PX)
    values = np.reshape(row[schema.EVIDENCE], (height, width)).tolist()
    logit = pa.chunked_array([[row[schema.LOGIT]]])
    odds = packed.log_odds_of(logit, classes(output.summary["target"]))
    bias = row[schema.EVIDENCE_BIAS]
    shown = {"height": height, "width": width, "values": values, "covers": covers}
    return {"log_odds": odds.item(), "bias": bias, "limit": overlay.limit_of(np.array(values), bias), **shown}


def _message(row: Mapping[str, Any]) -> str | None:
    message = row[schema.ERROR_MESSAGE]
    return None if message is None else without_folders(message)


def _name(request: Request) -> str:
    """The id that a request names."""
    names = request.query_params.getlist("name")
    if len(names) != 1:
        raise RefusedError(422, "invalid_request", "expected one option `name`, the id of a slide or field")
    return names[0]


def _query(request: Request) -> Query:
    given = request.query_params
    try:
        if len(given) < len(given.multi_items()):
            raise RefusedError(422, "invalid_request", "an option is given more than once")
        return Query.model_validate({name: value for name, value in given.items() if name != JOB})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "options"
        raise RefusedError(
            422, "invalid_request", f"{place}: {first['msg'].removeprefix('Value error, ')}"
        ) from None


def _answered(error: RefusedError) -> Response:
    return JSONResponse(error.document(), error.status, error.headers)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _answered(error)


async def _broken(_: Request, error: Exception) -> Response:
    found = read.withheld(error) if isinstance(error, StorageError) else error
    assert isinstance(found, ImageError)
    # Words of libraries may contain places of files.
    message = UNREADABLE if found.code in ledger.NAMING else without_folders(found.message)
    logger.info(f"an image cannot be shown: {found.code}", extra={"code": found.code})
    return _answered(front.refusal(ImageError(found.code, message)))


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return _answered(RefusedError(error.status_code, code, error.detail, error.headers))
