"""The HTTP interface as a FastAPI app: its routes and errors. An `Engine` computes."""

import asyncio
import base64
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, Protocol

import numpy as np
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from bcd import provenance
from bcd.errors import MissingError, StorageError
from bcd.imaging import image
from bcd.model.card import Card
from bcd.model.predictor import Prediction
from bcd.serving import front, slide_jobs, upload
from bcd.serving.documents import (
    NOTICE,
    Answer,
    BatchAnswer,
    BatchItem,
    ErrorBody,
    ErrorDocument,
    Health,
    ModelDocument,
    NamedSlide,
    SlideDocument,
    answer,
    drawn,
    drawn_limit,
    scale_of,
)
from bcd.serving.middleware import REQUEST_ID, SENT_ID
from bcd.serving.receive import SLIDES, Limits, RefusedError, require_name
from bcd.serving.slide_jobs import SlideJobs
from bcd.taxonomy import MAX_MPP, MIN_MPP

logger = logging.getLogger(__name__)

# Where FastAPIOffline mounts the files of Swagger UI.
DOCS_FILES = "/static-offline-docs"


class Engine(Protocol):
    """A replica, or a bundle alone in tests."""

    card: Card
    model_id: str

    async def look(self, content: bytes) -> tuple[np.ndarray, Prediction]:
        """Pixels, uint8 (h, w, 3) RGB, and a prediction of one row for an encoded image.

        Raises:
            ImageError: it cannot be decoded.
        """

    async def ready(self) -> bool:
        """Whether a forward pass has succeeded recently."""


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": ErrorDocument} for code in codes}


BINARY = {"schema": {"type": "string", "format": "binary"}}
IMAGE_TYPES = ("image/png", "image/jpeg", "image/tiff", "application/octet-stream")
SEVERAL = {"type": "array", "items": BINARY["schema"], "minItems": 1}


def _body(field: str, schema: dict[str, Any], *raw: str) -> dict[str, Any]:
    """A request body in OpenAPI: a form with one field, or one of the raw content types."""
    form = {"schema": {"type": "object", "required": [field], "properties": {field: schema}}}
    content = dict.fromkeys(raw, BINARY) | {"multipart/form-data": form}
    return {"requestBody": {"required": True, "content": content}}


Scale = Annotated[
    float | None, Query(ge=MIN_MPP, le=MAX_MPP, description="µm per pixel of a slide that states none")
]
WORK_ERRORS = _errors(400, 401, 408, 413, 415, 422, 500, 503, 504)


def create_app(engine: Engine, limits: Limits, max_images: int, slides: SlideJobs | None = None) -> FastAPI:
    """The app around an engine, and a folder of slides if it scores any; without authentication and limits,
    which are `middleware.Guard`'s."""
    # It logs bytes of forms that it cannot read; the answer says what is wrong with them.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    app = FastAPIOffline(
        docs_url=None,
        redoc_url=None,
        # Starlette fails on an address that it would redirect and whose query is no UTF-8.
        redirect_slashes=False,
        title="bcd",
        version=provenance.own_version(),
        description=f"Breast-histopathology fields of view: probability and evidence. **{NOTICE}**",
    )
    _handle_errors(app)
    _add_work(app, engine, max_images)
    if slides:
        _add_slides(app, slides)
    _add_facts(app, engine, limits, max_images)
    _add_page(app)
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        return JSONResponse(error.document(), error.status, error.headers)

    @app.exception_handler(image.ImageError)
    async def broken(request: Request, error: image.ImageError) -> Response:
        return await refused(request, front.refusal(error))

    @app.exception_handler(StorageError)
    async def withheld(request: Request, error: StorageError) -> Response:
        # Its message names places of the service.
        logger.warning(f"a slide cannot be read or written: {error}")
        if isinstance(error, MissingError):  # deleted while it was read
            return await refused(request, RefusedError(404, "no_slide", "this slide is no longer there"))
        why = "the folder of slides cannot be read or written; try again later"
        return await refused(request, RefusedError(503, image.UNAVAILABLE, why, {"Retry-After": "60"}))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        message = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        if first["type"] == "bool_parsing":
            message = f"the option `{first['loc'][-1]}` is {first['input']!r:.60}; expected true or false"
        return await refused(request, RefusedError(422, "invalid_request", message))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        message = f"{error.detail}; see /docs"
        return await refused(request, RefusedError(error.status_code, code, message, error.headers))


def _add_work(app: FastAPI, engine: Engine, max_images: int) -> None:
    # Documents the token in OpenAPI; the guard checks it.
    bearer = Depends(HTTPBearer(auto_error=False, description="the service's token"))

    @app.post(
        "/v1/predict",
        response_model=Answer,
        responses=WORK_ERRORS | {200: {"content": {"image/png": BINARY}, "model": Answer}},
        openapi_extra=_body(upload.ONE, BINARY["schema"], *IMAGE_TYPES),
        dependencies=[bearer, Depends(upload.options("overlay", "preview"))],
    )
    async def predict(
        request: Request,
        overlay: Annotated[bool, Query(description="with `overlay_png`, base64")] = False,
        preview: Annotated[bool, Query(description="with `preview_png`, base64, at most 1024 px")] = False,
    ) -> Any:
        """One image (PNG, JPEG or TIFF) as raw body, or as multipart field `file`.

        With `Accept: image/png` the answer is the image with its evidence drawn over it; the header
        `X-Evidence-Limit` is the number of log-odds per cell at full colour; of a model without a closed
        form, the value of Grad-CAM.
        """
        sent = await upload.one(request)
        async with _logged(sent, request):
            seen = await _look(engine, sent)
            if not request.headers.get("accept", "").lower().startswith("image/png"):
                given = engine.card, engine.model_id, *seen
                return await asyncio.to_thread(answer, *given, overlay, preview)
            png = await asyncio.to_thread(drawn, engine.card, *seen[1:])
        headers = {"X-Model-Id": engine.model_id, "X-Evidence-Limit": f"{drawn_limit(seen[2]):g}"}
        return Response(png, media_type="image/png", headers=headers)

    @app.post(
        "/v1/predict/batch",
        response_model=BatchAnswer,
        responses=WORK_ERRORS,
        openapi_extra=_body(upload.MANY, SEVERAL),
        dependencies=[bearer, Depends(upload.options())],
    )
    async def predict_batch(request: Request) -> Any:
        """Several images as multipart field `files`: an answer or an error for each."""
        files = await upload.many(request, max_images)
        return BatchAnswer(results=await asyncio.gather(*(_item(engine, sent, request) for sent in files)))


SLIDE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            IMAGE_TYPES[-1]: BINARY,
            "application/json": {"schema": NamedSlide.model_json_schema()},
        },
    }
}


def _add_slides(app: FastAPI, jobs: SlideJobs) -> None:
    """Add the routes to an app, whose guard has put a slide that was sent into its place already."""
    bearer = [Depends(HTTPBearer(auto_error=False))]
    _add_slide_post(app, jobs, bearer)

    @app.get(
        SLIDES + "/{job_id}",
        response_model=SlideDocument,
        response_model_exclude_none=True,
        responses=_errors(401, 404, 503),
        dependencies=[*bearer, Depends(upload.options())],
    )
    async def about_slide(job_id: str) -> Any:
        """State, progress and, once it is done, the result of a slide."""
        return await asyncio.to_thread(jobs.document, job_id)

    @app.get(
        SLIDES + "/{job_id}/{name}",
        response_class=Response,
        responses=_errors(401, 404, 503),
        dependencies=[*bearer, Depends(upload.options())],
    )
    async def file_of_slide(job_id: str, name: str) -> Any:
        """A file of the result: the heat map, or the tiles as GeoJSON for QuPath."""
        if name not in slide_jobs.FILES:
            why = f"a slide has no {name[:40]}; it has {' and '.join(slide_jobs.FILES)}"
            raise RefusedError(404, "not_found", why)
        return Response(await asyncio.to_thread(jobs.file, job_id, name), media_type=slide_jobs.FILES[name])

    @app.delete(
        SLIDES + "/{job_id}",
        status_code=204,
        responses=_errors(401, 404, 503),
        dependencies=[*bearer, Depends(upload.options())],
    )
    async def remove_slide(job_id: str) -> Response:
        """Cancel a slide that waits or is being scored; delete one that has ended, with all its files."""
        await asyncio.to_thread(jobs.remove, job_id)
        return Response(status_code=204)


def _add_slide_post(app: FastAPI, jobs: SlideJobs, bearer: list[Any]) -> None:
    @app.post(
        SLIDES,
        status_code=202,
        response_model=SlideDocument,
        response_model_exclude_none=True,
        responses=_errors(400, 401, 404, 408, 413, 415, 422, 503),
        openapi_extra=SLIDE_BODY,
        dependencies=[*bearer, Depends(upload.options("name", "mpp"))],
    )
    async def add_slide(request: Request, name: str | None = None, mpp: Scale = None) -> Any:
        """Score a whole slide: its bytes as the body, with `name`, or JSON that names one of the archive.

        The answer has the id under which its state and result are found.
        """
        sent = request.headers.get(SENT_ID.decode())
        if sent:
            about = await asyncio.to_thread(jobs.add_sent, sent, require_name(name), mpp)
        else:
            named = await _named(request)
            about = await asyncio.to_thread(jobs.add_named, named.name, named.mpp)
        document = await asyncio.to_thread(jobs.document, about.id)
        shown = SlideDocument.model_validate(document).model_dump(mode="json", exclude_none=True)
        return JSONResponse(shown, 202, {"Location": f"{SLIDES}/{about.id}"})


async def _named(request: Request) -> NamedSlide:
    if request.query_params:
        raise RefusedError(422, "unknown_option", "with a body of JSON, name and mpp belong into the body")
    try:
        return NamedSlide.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        why = f'{where}: {first["msg"]}; expected JSON such as {{"name": "2026/biopsy.svs"}}'
        raise RefusedError(422, "invalid_request", why) from None


def _add_facts(app: FastAPI, engine: Engine, limits: Limits, max_images: int) -> None:
    bearer = Depends(HTTPBearer(auto_error=False))

    @app.get(
        "/v1/model",
        response_model=ModelDocument,
        # Thousands of numbers that no client uses.
        response_model_exclude={"card": {"feature_statistics"}},
        responses=_errors(401, 422, 503, 504),
        dependencies=[bearer, Depends(upload.options())],
    )
    async def about_model() -> Any:
        """The model card, its identity, the limits, and the scale of the overlays."""
        numbers = {"max_body_bytes": limits.max_body_bytes, "max_images": max_images}
        numbers["max_pixels"] = image.MAX_PIXELS
        if limits.slides:
            numbers["max_slide_bytes"] = limits.max_slide_bytes
        return ModelDocument(
            model_id=engine.model_id,
            version=app.version,
            card=engine.card,
            limits=numbers,
            overlay=scale_of(engine.card),
        )

    @app.get("/healthz", response_model=Health)
    async def alive() -> Any:
        """Whether the process answers."""
        return Health(status="alive")

    @app.get("/readyz", response_model=Health, responses=_errors(503))
    async def ready() -> Any:
        """Whether a forward pass has succeeded recently."""
        if not await engine.ready():
            raise RefusedError(503, "not_ready", "no forward pass has succeeded yet", {"Retry-After": "1"})
        return Health(status="ready")


def _add_page(app: FastAPI) -> None:
    folder = files("bcd.serving").joinpath("page")
    page = folder.joinpath("index.html").read_text(encoding="utf-8")
    docs = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=app.title,
        swagger_js_url=f"{DOCS_FILES}/swagger-ui-bundle.js",
        swagger_css_url=f"{DOCS_FILES}/swagger-ui.css",
        swagger_favicon_url=f"{DOCS_FILES}/favicon.png",
    )
    scripts = re.findall(rb"<script>(.*?)</script>", bytes(docs.body), re.DOTALL)
    docs.headers["Content-Security-Policy"] = _docs_policy(scripts)
    docs.headers["X-Content-Type-Options"] = "nosniff"

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=front.PAGE_HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def documentation() -> Response:
        return docs

    app.router.routes.extend(front.viewer_pages())
    app.mount("/page", StaticFiles(directory=str(folder)), name="page")


def _docs_policy(scripts: Iterable[bytes]) -> str:
    """`front.PAGE_POLICY` for Swagger UI: with its own inline scripts, by their hashes, and inline styles."""
    hashes = [base64.b64encode(hashlib.sha256(script).digest()).decode() for script in scripts]
    allowed = " ".join(["'self'", *(f"'sha256-{value}'" for value in hashes)])
    policy = front.PAGE_POLICY.replace("script-src 'self'", f"script-src {allowed}")
    return policy.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")


async def _look(engine: Engine, sent: upload.Sent) -> tuple[bytes, np.ndarray, Prediction]:
    # In a thread: recognising a slide may require a file on disk.
    content = await asyncio.to_thread(upload.field_of, sent)
    return content, *await engine.look(content)


async def _item(engine: Engine, sent: upload.Sent, request: Request) -> BatchItem:
    try:
        async with _logged(sent, request):
            seen = await _look(engine, sent)
            document = await asyncio.to_thread(answer, engine.card, engine.model_id, *seen)
    except image.ImageError as error:
        return BatchItem(name=sent.name, error=ErrorBody(code=error.code, message=error.message))
    return BatchItem(name=sent.name, answer=document)


@asynccontextmanager
async def _logged(sent: upload.Sent, request: Request) -> AsyncIterator[None]:
    """Log why an image has no answer: never with its name, which may be a patient's, but with its hash."""
    try:
        yield
    except image.ImageError as error:
        facts = {"image_id": await asyncio.to_thread(sent.sha256), "code": error.code}
        facts["request_id"] = request.headers.get(REQUEST_ID.decode())
        logger.info(f"an image cannot be used: {error.code}", extra=facts)
        raise
