"""The HTTP interface as a FastAPI app: its routes and errors. An `Engine` computes."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any, Protocol

import numpy as np
from fastapi import Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from bcd import provenance
from bcd.errors import MissingError, StorageError
from bcd.imaging import image
from bcd.model import novelty
from bcd.model.card import Card
from bcd.model.predictor import Prediction
from bcd.serving import front, slide_jobs, upload
from bcd.serving.documents import (
    Answer,
    BatchAnswer,
    BatchItem,
    ErrorBody,
    ErrorDocument,
    Health,
    ListedModel,
    ModelDocument,
    ModelList,
    NamedSlide,
    SlideDocument,
    answer,
    drawn,
    drawn_limit,
    scale_of,
)
from bcd.serving.middleware import REQUEST_ID, SENT_ID
from bcd.serving.openapi import explained
from bcd.serving.openapi.explained import errors, shows
from bcd.serving.openapi.swagger import swagger_page
from bcd.serving.receive import MODELS, SLIDES, Limits, RefusedError, require_name
from bcd.serving.slide_jobs import SlideJobs
from bcd.serving.telemetry import signals
from bcd.taxonomy import MAX_MPP, MIN_MPP
from bcd.text import RESEARCH_ONLY

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Named:
    """A model among those of its service: its name, the names of those beside it, and what records its
    answers."""

    name: str = "default"
    others: tuple[str, ...] = ()
    record: signals.Record = signals.silent

    def require(self, name: str) -> None:
        """Raises RefusedError for the name of another model."""
        if name != self.name:
            why = f"this service has no model `{name[:40]}`; GET {MODELS} lists them"
            raise RefusedError(404, "no_model", why)


def _errors(*groups: Iterable[str]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorDocument, **shown} for status, shown in errors(*groups).items()}


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
Overlay = Annotated[bool, Query(description="with `overlay_png`, base64")]
Preview = Annotated[bool, Query(description="with `preview_png`, base64, at most 1024 px")]
Name = Annotated[str, Path(description=f"a name of `GET {MODELS}`", examples=["default"])]
FileName = Annotated[str, Path(description=" or ".join(slide_jobs.FILES))]
JobId = Annotated[str, Path(description="the id in the answer to `add_slide`")]


def create_app(
    engine: Engine,
    limits: Limits,
    max_images: int,
    slides: SlideJobs | None = None,
    named: Named = Named(),
) -> FastAPI:
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
        description=f"Breast-histopathology fields of view: probability and evidence. **{RESEARCH_ONLY}**",
        openapi_tags=explained.TAGS,
        generate_unique_id_function=lambda route: route.name,
    )
    _handle_errors(app)
    _add_predict(app, engine, named)
    _add_batch(app, engine, max_images, named)
    if slides:
        _add_slides(app, slides)
    _add_models(app, engine, limits, max_images, named)
    _add_health(app, engine)
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


# Documents the token in OpenAPI; the guard checks it.
BEARER = Depends(HTTPBearer(auto_error=False, description="the service's token"))


def _add_predict(app: FastAPI, engine: Engine, named: Named) -> None:
    described: dict[str, Any] = {
        "response_model": Answer,
        "responses": _errors(explained.ANY, explained.BODY, explained.FORM, explained.IMAGE)
        | shows(explained.ANSWER, "The answer, or the image under its evidence."),
        "openapi_extra": _body(upload.ONE, BINARY["schema"], *IMAGE_TYPES),
        "dependencies": [BEARER, Depends(upload.options("overlay", "preview"))],
        "tags": [explained.PREDICT],
    }
    described["responses"][200]["content"]["image/png"] = BINARY

    @app.post("/v1/predict", summary="Predict one image", **described)
    async def predict(request: Request, overlay: Overlay = False, preview: Preview = False) -> Any:
        """One image (PNG, JPEG or TIFF) as raw body, or as multipart field `file`.

        With `Accept: image/png` the answer is the image with its evidence drawn over it; the header
        `X-Evidence-Limit` is the number of log-odds per cell at full colour; of a model without a closed
        form, the value of Grad-CAM.
        """
        sent = await upload.one(request)
        async with _logged(sent, request, named):
            seen = await _look(engine, sent, named)
            if not request.headers.get("accept", "").lower().startswith("image/png"):
                given = engine.card, engine.model_id, *seen
                return await asyncio.to_thread(answer, *given, overlay, preview)
            png = await asyncio.to_thread(drawn, engine.card, *seen[1:])
        headers = {"X-Model-Id": engine.model_id, "X-Evidence-Limit": f"{drawn_limit(seen[2]):g}"}
        return Response(png, media_type="image/png", headers=headers)

    described["responses"] = described["responses"] | _errors(explained.ANY_MODEL)

    @app.post(MODELS + "/{name}/predict", summary="Predict one image with a named model", **described)
    async def predict_with_model(
        name: Name, request: Request, overlay: Overlay = False, preview: Preview = False
    ) -> Any:
        """As `/v1/predict`, by the model of this name."""
        named.require(name)
        return await predict(request, overlay, preview)


def _add_batch(app: FastAPI, engine: Engine, max_images: int, named: Named) -> None:
    described: dict[str, Any] = {
        "response_model": BatchAnswer,
        "responses": _errors(explained.ANY, explained.BODY, explained.FORM)
        | shows(explained.BATCH, "An answer or an error for each image, in the order of the request."),
        "openapi_extra": _body(upload.MANY, SEVERAL),
        "dependencies": [BEARER, Depends(upload.options())],
        "tags": [explained.PREDICT],
    }

    @app.post("/v1/predict/batch", summary="Predict several images", **described)
    async def predict_batch(request: Request) -> Any:
        """Several images as multipart field `files`: an answer or an error for each."""
        files = await upload.many(request, max_images)
        items = (_item(engine, sent, request, named) for sent in files)
        return BatchAnswer(results=await asyncio.gather(*items))

    described["responses"] = described["responses"] | _errors(explained.ANY_MODEL)

    @app.post(MODELS + "/{name}/predict/batch", summary="Predict several with a named model", **described)
    async def predict_batch_with_model(name: Name, request: Request) -> Any:
        """As `/v1/predict/batch`, by the model of this name."""
        named.require(name)
        return await predict_batch(request)


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
    described: dict[str, Any] = {
        "dependencies": [BEARER, Depends(upload.options())],
        "tags": [explained.SLIDES],
        "responses": _errors(explained.ANY, explained.KNOWN_SLIDE),
    }
    _add_slide_post(app, jobs)

    @app.get(
        SLIDES + "/{job_id}",
        summary="State or result of a slide",
        response_model=SlideDocument,
        response_model_exclude_none=True,
        **described | {"responses": described["responses"] | shows(explained.SLIDE, "The slide.")},
    )
    async def get_slide(job_id: JobId) -> Any:
        """State, progress and, once it is done, the result of a slide."""
        return await asyncio.to_thread(jobs.document, job_id)

    found = {200: {"description": "The file.", "content": dict.fromkeys(slide_jobs.FILES.values(), BINARY)}}

    @app.get(
        SLIDES + "/{job_id}/{name}",
        summary="A file of a slide's result",
        response_class=Response,
        **described | {"responses": _errors(explained.ANY, explained.SLIDE_FILE) | found},
    )
    async def get_slide_file(job_id: JobId, name: FileName) -> Any:
        """A file of the result: the heat map, or the tiles as GeoJSON for QuPath."""
        if name not in slide_jobs.FILES:
            why = f"a slide has no {name[:40]}; it has {' and '.join(slide_jobs.FILES)}"
            raise RefusedError(404, "not_found", why)
        return Response(await asyncio.to_thread(jobs.file, job_id, name), media_type=slide_jobs.FILES[name])

    @app.delete(SLIDES + "/{job_id}", summary="Cancel or delete a slide", status_code=204, **described)
    async def delete_slide(job_id: JobId) -> Response:
        """Cancel a slide that waits or is being scored; delete one that has ended, with all its files."""
        await asyncio.to_thread(jobs.remove, job_id)
        return Response(status_code=204)


def _add_slide_post(app: FastAPI, jobs: SlideJobs) -> None:
    @app.post(
        SLIDES,
        summary="Score a whole slide",
        status_code=202,
        response_model=SlideDocument,
        response_model_exclude_none=True,
        responses=_errors(explained.ANY, explained.SENT_SLIDE)
        | shows(explained.SLIDE, "The slide waits; `Location` is its address.", 202),
        openapi_extra=SLIDE_BODY,
        dependencies=[BEARER, Depends(upload.options("name", "mpp"))],
        tags=[explained.SLIDES],
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


def _add_models(app: FastAPI, engine: Engine, limits: Limits, max_images: int, named: Named) -> None:
    described: dict[str, Any] = {
        "dependencies": [BEARER, Depends(upload.options())],
        "responses": _errors(explained.ANY) | shows(explained.MODEL, "The model."),
        "tags": [explained.MODELS],
    }
    # Thousands of numbers that no client uses.
    about = {"response_model": ModelDocument, "response_model_exclude": {"card": {"feature_statistics"}}}

    @app.get("/v1/model", summary="The model", **described | about)
    async def get_model() -> Any:
        """The model card, its identity, the limits, and the scale of the overlays."""
        numbers = {"max_body_bytes": limits.max_body_bytes, "max_images": max_images}
        numbers["max_pixels"] = image.MAX_PIXELS
        if limits.slides:
            numbers["max_slide_bytes"] = limits.max_slide_bytes
        return ModelDocument(
            name=named.name,
            model_id=engine.model_id,
            version=app.version,
            card=engine.card,
            limits=numbers,
            overlay=scale_of(engine.card),
        )

    described["responses"] = described["responses"] | _errors(explained.ANY_MODEL)

    @app.get(MODELS + "/{name}", summary="A named model", **described | about)
    async def get_named_model(name: Name) -> Any:
        """As `/v1/model`, of the model of this name."""
        named.require(name)
        return await get_model()

    described["responses"] = _errors(explained.ANY) | shows(explained.LISTED, "The models.")

    @app.get(MODELS, summary="All models", response_model=ModelList, **described)
    async def list_models() -> Any:
        """The models of this service by name, the default one first."""
        names = [named.name, *named.others]
        return ModelList(
            models=[
                ListedModel(name=name, default=name == named.name, predict=f"{MODELS}/{name}/predict")
                for name in names
            ]
        )


def _add_health(app: FastAPI, engine: Engine) -> None:
    alive, is_ready = ({"status": status} for status in ("alive", "ready"))

    @app.get(
        "/healthz",
        summary="Alive",
        response_model=Health,
        responses=shows(alive, "The process answers."),
        tags=[explained.HEALTH],
    )
    async def get_health() -> Any:
        """Whether the process answers."""
        return alive

    @app.get(
        "/readyz",
        summary="Ready",
        response_model=Health,
        responses=_errors(["not_ready"]) | shows(is_ready, "A forward pass has succeeded a moment ago."),
        tags=[explained.HEALTH],
    )
    async def get_readiness() -> Any:
        """Whether a forward pass has succeeded recently."""
        if not await engine.ready():
            raise RefusedError(503, "not_ready", "no forward pass has succeeded yet", {"Retry-After": "1"})
        return is_ready


def _add_page(app: FastAPI) -> None:
    folder = files("bcd.serving").joinpath("page")
    page = folder.joinpath("index.html").read_text(encoding="utf-8")
    docs = swagger_page(app.title, front.PAGE_POLICY)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=front.PAGE_HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def documentation() -> Response:
        return docs

    app.router.routes.extend(front.viewer_pages())
    app.mount("/page", StaticFiles(directory=str(folder)), name="page")


async def _look(engine: Engine, sent: upload.Sent, named: Named) -> tuple[bytes, np.ndarray, Prediction]:
    # In a thread: recognising a slide may require a file on disk.
    content = await asyncio.to_thread(upload.field_of, sent)
    pixels, prediction = await engine.look(content)
    _record(engine.card, prediction, named.record)
    return content, pixels, prediction


def _record(card: Card, prediction: Prediction, record: signals.Record) -> None:
    (found,) = prediction.predicted_class
    if found is None:  # its logits are not finite, which is an error
        return
    distance = float(prediction.novelty[0])
    limit = card.feature_statistics.cutoff if card.feature_statistics else None
    ratio = distance / limit if limit else None
    probability = float(prediction.probability_malignant[0])
    signals.record_answer(record, found, probability, ratio, novelty.warning_codes(distance, limit))


async def _item(engine: Engine, sent: upload.Sent, request: Request, named: Named) -> BatchItem:
    try:
        async with _logged(sent, request, named):
            seen = await _look(engine, sent, named)
            document = await asyncio.to_thread(answer, engine.card, engine.model_id, *seen)
    except image.ImageError as error:
        return BatchItem(name=sent.name, error=ErrorBody(code=error.code, message=error.message))
    return BatchItem(name=sent.name, answer=document)


@asynccontextmanager
async def _logged(sent: upload.Sent, request: Request, named: Named) -> AsyncIterator[None]:
    """Log why an image has no answer: never with its name, which may be a patient's, but with its hash."""
    try:
        yield
    except image.ImageError as error:
        facts = {"image_id": await asyncio.to_thread(sent.sha256), "code": error.code}
        facts["request_id"] = request.headers.get(REQUEST_ID.decode())
        logger.info(f"an image cannot be used: {error.code}", extra=facts)
        named.record(signals.IMAGE_ERRORS, code=error.code)
        raise
