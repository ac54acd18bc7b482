"""What callers send: the pictures in a request, and what to send instead of anything else.

Nothing is guessed and nothing passed over: an option or a field that is not known, a part of a form that is
no file, a picture wrapped in text and a whole slide are told by name.
"""

import re
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from bcd.imaging.image import ImageError
from bcd.serving.middleware import RefusedError
from bcd.slides import slide
from bcd.text import listed

FORM = "multipart/form-data"
ONE, MANY = "file", "files"
EXAMPLES = {ONE: "curl -F file=@field.png", MANY: "curl -F files=@a.png -F files=@b.png"}
SEND = "send the bytes of the file itself, as the body (curl --data-binary @field.png) or in a form"
# What OpenSlide may know: TIFF, DICOM after its preamble, Sakura's SQLite. Where first bytes are, and which.
SLIDE_STARTS = ((0, b"II"), (0, b"MM"), (128, b"DICM"), (0, b"SQLite format 3\0"))
# First bytes of text or packing around a picture -> what it is.
WRAPPINGS = {
    rb"[{\[\"]": "JSON",
    rb"(?i)data:": "a data URI",
    rb"(?i)(https?|s3|gs|file)://": "an address, and no address is ever fetched",
    rb"\x1f\x8b|PK\x03\x04|7z\xbc\xaf|BZh|\xfd7zXZ": "a compressed file",
    rb"--[^\r\n]+\r?\n(?i:content-)": f"a form, but its Content-Type is not {FORM} with a boundary",
    rb"iVBORw0K|[/_]9j[/_]|SUk[qr]|TU0AK": "a picture in base64",
    rb"[\w.\[\]-]{1,40}=": "a form in URL encoding",
}
# Parts of a form; its size is bounded before it comes here.
MAX_PARTS, MAX_PART_BYTES = 1_000, 2**40


@dataclass(frozen=True)
class Sent:
    """One picture of a request: the name that it came with, and its bytes or what is wrong with it."""

    name: str
    content: bytes | ImageError


def options(*known: str) -> Callable[[Request], Awaitable[None]]:
    """A dependency of a route: its query has these options only, each at most once."""

    async def check(request: Request) -> None:
        names = [name for name, _ in request.query_params.multi_items()]
        if unknown := sorted(set(names) - set(known)):
            has = f"expected {listed([f'`{name}`' for name in known])}" if known else "it has no options"
            raise RefusedError(
                422, "unknown_option", f"{_quoted(unknown)} is no option of this address; {has}"
            )
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RefusedError(422, "invalid_request", f"the option {_quoted(twice)} is given more than once")

    return check


async def one(request: Request) -> Sent:
    """The picture of a request, as raw body or as form field `file`.

    Raises:
        RefusedError: it has none, or something else, or more than one.
    """
    if not _is_form(request):
        return Sent("", await request.body())
    found = await _parts(request, ONE)
    if len(found) > 1:
        several = (
            f"{len(found)} files, and one is answered here; send several to /v1/predict/batch as `{MANY}`"
        )
        raise RefusedError(400, "invalid_form", f"the form has {several}")
    return found[0]


async def many(request: Request, most: int) -> list[Sent]:
    """The pictures of a request as form field `files`, in their order; those that are none have an error.

    Args:
        request: of HTTP.
        most: pictures in it.

    Raises:
        RefusedError: it has none, or something else, or too many.
    """
    if not _is_form(request):
        raise RefusedError(
            415,
            "unsupported_format",
            f"expected {FORM} with a file in `{MANY}` for each picture ({EXAMPLES[MANY]})",
        )
    found = await _parts(request, MANY)
    if len(found) > most:
        raise RefusedError(
            400, "invalid_form", f"the form has {len(found)} files; at most {most} in one form"
        )
    return found


def field_of(sent: Sent) -> bytes:
    """The bytes of what may be a field of view; `image.decode` says whether it is.

    Raises:
        ImageError: what came with it; `whole_slide`, decided by the content as in an archive;
            `unsupported_format` for a picture that is wrapped in text or packed.
    """
    if isinstance(sent.content, ImageError):
        raise sent.content
    head = sent.content[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, what in WRAPPINGS.items():
        if re.match(start, head):
            raise ImageError("unsupported_format", f"it is {what}; {SEND}")
    # The picture in a MIRAX file is a small one of the whole slide, whose pixels are in a folder beside it.
    if sent.name.lower().endswith(slide.MRXS) or _is_slide(sent.content):
        raise ImageError(
            "whole_slide",
            "it is a whole slide, and single fields of view are answered here; score slides with "
            "jobs/score.py, or send one field as PNG, JPEG or TIFF",
        )
    return sent.content


def _is_slide(content: bytes) -> bool:
    if not any(content.startswith(start, at) for at, start in SLIDE_STARTS):
        return False
    with tempfile.NamedTemporaryFile(suffix=".tif") as file:
        file.write(content)
        file.flush()
        return slide.is_slide(file.name)


def _is_form(request: Request) -> bool:
    """Whether the body is a form; refuses bodies that are something else by their headers."""
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise RefusedError(415, "unsupported_format", f"the body is compressed (Content-Encoding); {SEND}")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("multipart/") and kind != FORM:
        raise RefusedError(415, "unsupported_format", f"the body is {kind}; expected {FORM}")
    return kind == FORM


async def _parts(request: Request, field: str) -> list[Sent]:
    """All files of a form, which has nothing but them in this field."""
    body, boundary = (
        await request.body(),
        parse_options_header(request.headers["content-type"])[1].get(b"boundary"),
    )
    try:
        async with request.form(
            max_files=MAX_PARTS, max_fields=MAX_PARTS, max_part_size=MAX_PART_BYTES
        ) as form:
            _require_end(body, boundary)
            _require_field_names(form, field)
            return [await _sent(part) for _, part in form.multi_items()]
    # Starlette hides its own errors behind HTTPException where an app is around it.
    except (MultiPartException, HTTPException) as error:
        message = error.message if isinstance(error, MultiPartException) else error.detail
        raise RefusedError(
            400, "invalid_form", f"{message} Expected a form as from {EXAMPLES[field]}"
        ) from None


def _require_end(body: bytes, boundary: bytes | None) -> None:
    """The parser forgets a part that does not end."""
    if boundary is None or b"--" + boundary + b"--" not in body:
        raise MultiPartException("The form has no end: its last boundary is missing.")


def _require_field_names(form: FormData, field: str) -> None:
    others = sorted(set(form.keys()) - {field})
    if field not in form:
        has = f"it has {_quoted(others)}" if others else "it is empty"
        raise RefusedError(
            422,
            "no_picture",
            f"the form has no file in its field `{field}`, {has}; send it so: {EXAMPLES[field]}",
        )
    if others:
        raise RefusedError(
            422,
            "unknown_field",
            f"the form also has {_quoted(others)}; expected `{field}` only, and options in the address",
        )


async def _sent(part: UploadFile | str) -> Sent:
    if isinstance(part, UploadFile):
        return Sent(part.filename or "", await part.read())
    why = "the part has no filename, so that it is text and no file; send it as a file (with @ in curl -F)"
    return Sent("", ImageError("no_filename", why))


def _quoted(names: list[str]) -> str:
    """Names that a caller made up, cut where they would fill the answer."""
    return listed([f"`{name[:40]}`" for name in names[:5]])
