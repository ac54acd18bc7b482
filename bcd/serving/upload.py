"""The images in a request, and errors that name what to send instead of anything else.

Nothing is guessed or ignored: unknown options and fields, parts of a form that are not files, images wrapped
in text and whole slides are errors.
"""

import hashlib
import re
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from bcd.imaging import child
from bcd.imaging.image import ImageError
from bcd.serving.receive import RefusedError
from bcd.slides import slide
from bcd.text import listed

FORM = "multipart/form-data"
ONE, MANY = "file", "files"
EXAMPLES = {ONE: "curl -F file=@field.png", MANY: "curl -F files=@a.png -F files=@b.png"}
SEND = "send the bytes of the file itself, as the body (curl --data-binary @field.png) or in a form"
# Position and first bytes of files that may be slides: TIFF, DICOM after its preamble, Sakura's SQLite.
SLIDE_STARTS = ((0, b"II"), (0, b"MM"), (128, b"DICM"), (0, b"SQLite format 3\0"))
# First bytes of text or compression around an image, and what it is.
WRAPPINGS = {
    rb"[{\[\"]": "JSON",
    rb"(?i)data:": "a data URI",
    rb"(?i)[a-z][a-z0-9+.-]*://": "an address, and the service fetches none",
    rb"\x1f\x8b|PK\x03\x04|7z\xbc\xaf|BZh|\xfd7zXZ": "a compressed file",
    rb"--[^\r\n]+\r?\n(?i:content-)": f"a form, but its Content-Type is not {FORM} with a boundary",
    rb"iVBORw0K|[/_]9j[/_]|SUk[qr]|TU0AK": "an image in base64",
    rb"[\w.\[\]-]{1,40}=": "a form in URL encoding",
}
# Parts of a form; its size is bounded before it comes here.
MAX_PARTS, MAX_PART_BYTES = 1_000, 2**40


@dataclass(frozen=True)
class Sent:
    """One image of a request: its file name, and its bytes or an error."""

    name: str
    content: bytes | ImageError

    def sha256(self) -> str | None:
        """As in the rows of an archive; None where there are no bytes."""
        return hashlib.sha256(self.content).hexdigest() if isinstance(self.content, bytes) else None


def options(*known: str) -> Callable[[Request], Awaitable[None]]:
    """A dependency of a route that rejects other options and repeated ones."""

    async def check(request: Request) -> None:
        names = [name for name, _ in request.query_params.multi_items()]
        if unknown := sorted(set(names) - set(known)):
            has = f"expected {_quoted(known)}" if known else "this address has no options"
            raise RefusedError(422, "unknown_option", f"unknown option {_quoted(unknown)}; {has}")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RefusedError(422, "invalid_request", f"the option {_quoted(twice)} is given more than once")

    return check


async def one(request: Request) -> Sent:
    """The image of a request, as raw body or as form field `file`.

    Raises:
        RefusedError: it has none, or something else, or more than one.
    """
    if not _is_form(request):
        return Sent("", await request.body())
    first, *others = await _parts(request, ONE)
    if others:
        raise RefusedError(
            400,
            "invalid_form",
            f"the form has {1 + len(others)} files, but this address accepts one; send several to "
            f"/v1/predict/batch as `{MANY}`",
        )
    return first


async def many(request: Request, most: int) -> list[Sent]:
    """The files of a request in form field `files`, in their order, each with bytes or an error.

    Raises:
        RefusedError: it has none, or something else, or more than `most`.
    """
    if not _is_form(request):
        why = f"expected {FORM} with a file in `{MANY}` for each image ({EXAMPLES[MANY]})"
        raise RefusedError(415, "unsupported_format", why)
    files = await _parts(request, MANY)
    if len(files) > most:
        raise RefusedError(
            400, "invalid_form", f"the form has {len(files)} files; at most {most} in one form"
        )
    return files


def field_of(sent: Sent) -> bytes:
    """The bytes of a possible field of view, for `decoder.decode_safely`.

    Raises:
        ImageError: the error of the part; `whole_slide`, recognised by the content as in an archive;
            `unsupported_format` for an image that is wrapped in text or compressed; as `child.call`.
    """
    if isinstance(sent.content, ImageError):
        raise sent.content
    head = sent.content[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, what in WRAPPINGS.items():
        if re.match(start, head):
            raise ImageError("unsupported_format", f"it is {what}; {SEND}")
    # A MIRAX file contains a small image of the slide; the slide's pixels are in a folder beside it.
    if sent.name.lower().endswith(slide.MRXS) or _is_slide(sent.content):
        raise ImageError(
            "whole_slide",
            "it is a whole slide, but this address accepts single fields of view; score slides with "
            "jobs/score.py, or send one field as PNG, JPEG or TIFF",
        )
    return sent.content


def _is_slide(content: bytes) -> bool:
    if not any(content.startswith(start, at) for at, start in SLIDE_STARTS):
        return False
    with tempfile.NamedTemporaryFile(suffix=".tif") as file:
        file.write(content)
        file.flush()
        return slide.is_slide(file.name, budget=child.QUICK)


def _is_form(request: Request) -> bool:
    """Whether the body is a form; rejects bodies that their headers declare as something else."""
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise RefusedError(415, "unsupported_format", f"the body is compressed (Content-Encoding); {SEND}")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("multipart/") and kind != FORM:
        raise RefusedError(415, "unsupported_format", f"the body is {kind}; expected {FORM}")
    return kind == FORM


async def _parts(request: Request, field: str) -> list[Sent]:
    """All files of a form, which has nothing else."""
    body = await request.body()
    boundary = parse_options_header(request.headers["content-type"])[1].get(b"boundary")
    limits = {"max_files": MAX_PARTS, "max_fields": MAX_PARTS, "max_part_size": MAX_PART_BYTES}
    try:
        async with request.form(**limits) as form:
            _require_end(body, boundary)
            _require_field_names(form, field)
            return [await _sent(part) for _, part in form.multi_items()]
    # Inside an app, Starlette raises HTTPException for its own errors.
    except (MultiPartException, HTTPException) as error:
        why = error.message if isinstance(error, MultiPartException) else error.detail
        raise RefusedError(400, "invalid_form", f"{why} Expected a form as from {EXAMPLES[field]}") from None


def _require_end(body: bytes, boundary: bytes | None) -> None:
    """Reject a form that is cut short: the parser drops a part that does not end."""
    if boundary is None or b"--" + boundary + b"--" not in body:
        raise MultiPartException("The form has no end: its last boundary is missing.")


def _require_field_names(form: FormData, field: str) -> None:
    others = sorted(set(form.keys()) - {field})
    if field not in form:
        has = f"it has {_quoted(others)}" if others else "it is empty"
        why = f"the form has no file in its field `{field}`, {has}; send it with {EXAMPLES[field]}"
        raise RefusedError(422, "no_picture", why)
    if others:
        why = f"the form also has {_quoted(others)}; expected `{field}` only, and options in the address"
        raise RefusedError(422, "unknown_field", why)


async def _sent(part: UploadFile | str) -> Sent:
    if isinstance(part, UploadFile):
        return Sent(part.filename or "", await part.read())
    why = "the part has no filename, so it is text and not a file; send it as a file (with @ in curl -F)"
    return Sent("", ImageError("no_filename", why))


def _quoted(names: Sequence[str]) -> str:
    """Names from a request, cut where they would fill the answer."""
    return listed([f"`{name[:40]}`" for name in names[:5]])
