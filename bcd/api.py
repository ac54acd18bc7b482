"""The HTTP interface as a FastAPI app: its routes and errors. What computes is an `Engine`."""

import asyncio
from importlib.resources import files
from typing import Annotated, Any, Protocol

import numpy as np
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from bcd import image, provenance
from bcd.answer import (
    NOTICE,
    Answer,
    BatchAnswer,
    BatchItem,
    ErrorBody,
    ErrorDocument,
    Health,
    ModelDocument,
    answer,
    drawn,
)
from bcd.bundle import Card, Prediction
from bcd.guard import Limits, RefusedError

STATUS = {"unsupported_format": 415, "empty": 422, "truncated": 422, "too_many_pixels": 422}
# The page loads nothing but itself, and sends nothing but to where it came from.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Engine(Protocol):
    """What computes: a replica, or a bundle alone in tests."""

    card: Card
    model_id: str

    async def look(self, content: bytes) -> tuple[np.ndarray, Prediction]:
        """An encoded picture to its pixels, uint8 (h, w, 3) RGB, and a prediction of one row.

        Raises:
            ImageError: it cannot be decoded.
        """

    async def ready(self) -> bool:
        """Whether a forward pass has succeeded a moment ago."""


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": ErrorDocument} for code in codes}


BINARY = {"schema": {"type": "string", "format": "binary"}}
PICTURE_TYPES = ("image/png", "image/jpeg", "image/tiff", "application/octet-stream")


def _multipart(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    form = {"type": "object", "required": [name], "properties": {name: schema}}
    return {"multipart/form-data": {"schema": form}}


ONE_BODY = {
    "requestBody": {
        "required": True,
        "content": dict.fromkeys(PICTURE_TYPES, BINARY) | _multipart("file", BINARY["schema"]),
    }
}
MANY_BODY = {
    "requestBody": {
        "required": True,
        "content": _multipart("files", {"type": "array", "items": BINARY["schema"], "minItems": 1}),
    }
}
WORK_ERRORS = _errors(400, 401, 408, 413, 415, 422, 503, 504)


def build(engine: Engine, limits: Limits, max_images: int) -> FastAPI:
    """The app around an engine; authentication and limits are `guard.Guard`'s."""
    app = FastAPIOffline(
        title="bcd",
        version=provenance.own_version(),
        description=f"Breast-histopathology fields of view: probability and evidence. **{NOTICE}**",
    )
    _handle_errors(app)
    _add_work(app, engine, max_images)
    _add_facts(app, engine, limits, max_images)
    _add_page(app)
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        return JSONResponse(error.document(), error.status, error.headers)

    @app.exception_handler(image.ImageError)
    async def broken(_: Request, error: image.ImageError) -> Response:
        return JSONResponse(
            {"error": {"code": error.code, "message": error.message}}, STATUS.get(error.code, 422)
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return JSONResponse(
            {"error": {"code": "invalid_request", "message": f"{where}: {first['msg']}"}}, 422
        )

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return JSONResponse(
            {"error": {"code": code, "message": f"{error.detail}; see /docs"}},
            error.status_code,
            error.headers,
        )


def _add_work(app: FastAPI, engine: Engine, max_images: int) -> None:
    # Stands in the OpenAPI document; the guard does the work.
    bearer = Depends(HTTPBearer(auto_error=False, description="the service's token"))

    @app.post(
        "/v1/predict",
        response_model=Answer,
        responses=WORK_ERRORS | {200: {"content": {"image/png": BINARY}, "model": Answer}},
        openapi_extra=ONE_BODY,
        dependencies=[bearer],
    )
    async def predict(
        request: Request,
        overlay: Annotated[bool, Query(description="with `overlay_png`, base64")] = False,
        preview: Annotated[bool, Query(description="with `preview_png`, base64, at most 1024 px")] = False,
    ) -> Any:
        """One picture (PNG, JPEG or TIFF) as raw body, or as multipart field `file`.

        With `Accept: image/png` the answer is the picture with its evidence laid over it.
        """
        content = (await _pictures(request, "file", 1))[0][1]
        as_picture = request.headers.get("accept", "").startswith("image/png")
        pixels, prediction = await engine.look(content)
        if as_picture:
            png = await asyncio.to_thread(drawn, engine.card, pixels, prediction)
            return Response(png, media_type="image/png", headers={"X-Model-Id": engine.model_id})
        return await asyncio.to_thread(
            answer, engine.card, engine.model_id, pixels, prediction, overlay, preview
        )

    @app.post(
        "/v1/predict/batch",
        response_model=BatchAnswer,
        responses=WORK_ERRORS,
        openapi_extra=MANY_BODY,
        dependencies=[bearer],
    )
    async def predict_batch(request: Request) -> Any:
        """Several pictures as multipart field `files`: an answer or an error for each."""
        found = await _pictures(request, "files", max_images)
        results = await asyncio.gather(*(_item(engine, name, content) for name, content in found))
        return BatchAnswer(results=list(results))


def _add_facts(app: FastAPI, engine: Engine, limits: Limits, max_images: int) -> None:
    bearer = Depends(HTTPBearer(auto_error=False))

    @app.get(
        "/v1/model",
        response_model=ModelDocument,
        # Thousands of numbers that nobody looks at.
        response_model_exclude={"card": {"feature_statistics"}},
        responses=_errors(401, 503, 504),
        dependencies=[bearer],
    )
    async def about_model() -> Any:
        """The model card, its identity, the limits, and the scale of the overlays."""
        numbers = {
            "max_body_bytes": limits.max_body_bytes,
            "max_images": max_images,
            "max_pixels": image.MAX_PIXELS,
        }
        return ModelDocument(model_id=engine.model_id, version=app.version, card=engine.card, limits=numbers)

    @app.get("/healthz", response_model=Health)
    async def alive() -> Any:
        """Whether the process answers."""
        return Health(status="alive")

    @app.get("/readyz", response_model=Health, responses=_errors(503))
    async def ready() -> Any:
        """Whether a forward pass has succeeded a moment ago."""
        if not await engine.ready():
            raise RefusedError(503, "not_ready", "no forward pass has succeeded yet", {"Retry-After": "1"})
        return Health(status="ready")


def _add_page(app: FastAPI) -> None:
    folder = files("bcd").joinpath("page")
    page = folder.joinpath("index.html").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    app.mount("/page", StaticFiles(directory=str(folder)), name="page")


async def _pictures(request: Request, field: str, most: int) -> list[tuple[str, bytes]]:
    """(name, bytes) of the pictures in a request.

    Raises:
        RefusedError: there are none, or too many, or the form is broken.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        if field != "file":
            raise RefusedError(415, "unsupported_format", f"expected multipart/form-data with `{field}`")
        return [("", await request.body())]
    try:
        async with request.form(max_files=most, max_fields=most) as form:
            given = [part for part in form.getlist(field) if isinstance(part, UploadFile)]
            found = [(part.filename or "", await part.read()) for part in given]
    # Starlette hides its own errors behind HTTPException where an app is around it.
    except (MultiPartException, HTTPException) as error:
        message = error.message if isinstance(error, MultiPartException) else error.detail
        raise RefusedError(400, "invalid_form", f"{message}; at most {most} files in one form") from None
    if not found:
        raise RefusedError(422, "no_picture", f"the form has no file in its field `{field}`")
    return found


async def _item(engine: Engine, name: str, content: bytes) -> BatchItem:
    try:
        pixels, prediction = await engine.look(content)
    except image.ImageError as error:
        return BatchItem(name=name, error=ErrorBody(code=error.code, message=error.message))
    document = await asyncio.to_thread(answer, engine.card, engine.model_id, pixels, prediction)
    return BatchItem(name=name, answer=document)
