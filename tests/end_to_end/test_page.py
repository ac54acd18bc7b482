"""The page in a real browser: what a user gives it, sees and takes away.

Tests that take `page_url` hold for any service without a token: they compare the page with what the API says
of the same bytes. Those that take `mock` need a service that misbehaves on command: tests/page_mock.py.
"""

import base64
import contextlib
import csv
import io
import json
import os
import re
import shutil
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from bcd import schema, storage
from bcd.imaging import image
from bcd.model import predictor
from bcd.reports import gallery, overlay
from bcd.scoring import ledger
from bcd.serving import api, middleware
from bcd.serving.receive import Limits
from bcd.serving.slide_jobs import SlideJobs
from tests import page_mock, pictures, service
from tests.cluster import wait_for
from tests.imaging.test_image import SWAPPED
from tests.model.test_bundle import card, untrained
from tests.reports import test_gallery, test_model_report
from tests.serving.test_api import statistics

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser tests")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)"),
]

expect, Page = sync_api.expect, sync_api.Page
# The machine may be busy with other tests.
PATIENCE_MS = 60_000
File = dict[str, Any]


def launch(playwright: Any) -> Any:
    """Debian's browser, without requests of its own."""
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    return playwright.chromium.launch(executable_path=CHROMIUM, args=flags, timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for all tests."""
    expect.set_options(timeout=PATIENCE_MS)
    with sync_api.sync_playwright() as playwright:
        found = launch(playwright)
        yield found
        found.close()


# A real service answers as the mock does: one test sees it each time, the others as trials.
REAL = pytest.param("service", marks=pytest.mark.trial)


@pytest.fixture(scope="module", params=["mock", REAL])
def page_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the page is served, without a token: by the mock, and by the service around a real network."""
    if request.param == "mock":
        with page_mock.running() as found:
            yield found.url
        return
    # Visible maps, and a cut-off that some images exceed.
    network = untrained(std=1)
    facts = card(
        feature_statistics=statistics(cutoff=0.6),
        input_height_px=224,
        input_width_px=336,
        magnifications=(40, 100),
    )
    uri = str(tmp_path_factory.mktemp("model"))
    predictor.save(network, facts, uri)
    engine = service.LocalEngine(predictor.load(uri, device="cpu"))
    with service.serving(service.guarded(engine, token=None)) as url:
        yield url


@pytest.fixture
def mock() -> Iterator[page_mock.Mock]:
    """A service that misbehaves on command."""
    with page_mock.running() as found:
        yield found


@pytest.fixture
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page that must have no script errors, and send requests to its own service only."""
    options = {"viewport": {"width": 1280, "height": 900}} | getattr(request, "param", {})
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE_MS)
    found = context.new_page()
    wrong: list[str] = []
    hosts: set[str] = set()
    found.on("pageerror", lambda error: wrong.append(f"uncaught: {error}"))
    found.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    found.on("request", lambda sent: hosts.add(urlsplit(sent.url).netloc))
    yield found
    own = urlsplit(found.url).netloc
    context.close()
    # The browser itself notes each answer that is an error; nothing else may go wrong.
    assert not [line for line in wrong if not line.startswith("Failed to load resource")]
    assert hosts - {""} == {own}


@pytest.fixture
def shot(page: Page, request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Take a screenshot under a name; it lands in BCD_SCREENSHOTS."""
    folder = Path(os.environ.get("BCD_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", request.node.name.removeprefix("test_")).strip("-")
    return lambda part="": page.screenshot(path=folder / f"{name}{part}.png", full_page=True)


def file(name: str, height: int = 46, width: int = 70, shade: float = 1.0, kind: str = "PNG") -> File:
    """An image for the browser; `shade` makes the answers differ."""
    pixels = (pictures.gradient(height, width) * shade).astype(np.uint8)
    content = pictures.encode(pixels, kind)
    return {"name": name, "mimeType": f"image/{kind.lower()}", "buffer": content}


SEVERAL = [file(f"field {n}.png", 46, 70 + n, shade) for n, shade in enumerate((0.9, 0.2, 0.6, 1.0, 0.4))]
BROKEN = {"name": "cut.png", "mimeType": "image/png", "buffer": file("", 200, 300)["buffer"][:400]}
TEXT = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"not an image at all"}
HOSTILE = ["<img src=x onerror=alert(1)>.png", "=cmd|'calc'!A1.png", '-1,"two".png', "@sum.png", "+44 20.png"]


def get_json(url: str, content: bytes | None = None) -> dict[str, Any]:
    request = urllib.request.Request(
        url, content, {"Content-Type": "application/octet-stream"} if content else {}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def answer(url: str, one: File) -> dict[str, Any]:
    """What the API says of the same bytes."""
    return get_json(f"{url}/v1/predict", one["buffer"])


def probability(value: float) -> str:
    return "> 0.999" if value > 0.999 else "< 0.001" if value < 0.001 else f"{value:.3f}"


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\u2212")


def visit(page: Page, url: str) -> None:
    page.goto(url)
    expect(page.locator("#work")).to_be_visible()


def settle(page: Page) -> None:
    """Wait until all is answered, and the chosen image drawn."""
    expect(page.locator("#progress")).to_be_hidden()
    expect(page.locator("#viewer")).to_have_attribute("aria-busy", "false")


def upload(page: Page, *files: File) -> None:
    page.set_input_files("#files", list(files))
    settle(page)


def drop(page: Page, name: str, content: bytes) -> None:
    """A file that is dropped on the page."""
    page.evaluate(
        """([name, content]) => {
            const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], name));
            document.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
        }""",
        [name, base64.b64encode(content).decode()],
    )


def enter(page: Page, url: str) -> None:
    """Open the page of a service with a token."""
    page.goto(url)
    page.get_by_label("Token").fill(service.TOKEN)
    page.get_by_role("button", name="Continue").click()
    # It accepts images after the token.
    expect(page.locator("#work")).to_be_visible(timeout=PATIENCE_MS)


def chooser(page: Page) -> Any:
    """The dialogue that Space opens on the focused file input.

    A browser opens none for a key that it hears of seconds too late, as on a machine with much to do.
    """
    for _ in range(5):
        with contextlib.suppress(sync_api.TimeoutError), page.expect_file_chooser(timeout=10_000) as opened:
            page.keyboard.press("Space")
            return opened.value
    raise AssertionError("Space opens no dialogue")


def pixels(page: Page, canvas: str = "#evidence") -> np.ndarray:
    """The pixels of a canvas, uint8 (height, width, 3)."""
    url = page.locator(canvas).evaluate("canvas => canvas.toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def column(page: Page, number: int) -> list[str]:
    return page.locator(f"#rows tr td:nth-child({number})").all_inner_texts()


def names(page: Page) -> list[str]:
    return [text.strip() for text in column(page, 1)]


def row(page: Page, name: str) -> Any:
    return page.locator("#rows tr").filter(has=page.get_by_role("button", name=name, exact=True))


def head(page: Page, name: str) -> Any:
    return page.locator("#heads").get_by_role("button", name=name)


# ---- on any service: the page says what the API says -------------------------------------------------------


def test_the_page_names_the_model_and_what_it_is_for(page: Page, page_url: str, shot: Any) -> None:
    about = get_json(f"{page_url}/v1/model")
    visit(page, page_url)
    expect(
        page.get_by_text("Research use only. Not a medical device, and not for diagnosis.")
    ).to_be_visible()
    expect(page.locator("#facts")).to_contain_text(about["model_id"])
    expect(page.locator("#facts")).to_contain_text(about["version"])
    for magnification in about["card"]["magnifications"]:
        expect(page.locator("#facts")).to_contain_text(f"{magnification}X")
    expect(page.locator("#banners .banner")).to_have_count(
        about["card"]["synthetic"] + about["card"]["leaky"]
    )
    shot()
    page.get_by_text("More about this model").click()
    for _, value, interval in about["card"]["metrics"].get("summary", []):
        expect(page.locator("#measures")).to_contain_text(f"{value}{interval}")
    shot("-more")


def test_one_image(page: Page, page_url: str, shot: Any) -> None:
    one = file("field.png", 92, 140)
    said = answer(page_url, one)
    visit(page, page_url)
    upload(page, one)
    verdict = page.locator("#verdict")
    expect(page.locator("#shown")).to_have_text("field.png")
    expect(verdict.locator(".chip")).to_have_text(said["predicted_class"].replace("_", " "))
    expect(verdict.locator(".number")).to_have_text(probability(said["probability_malignant"]))
    expect(verdict).to_contain_text("the model's probability of malignancy")
    expect(verdict).to_contain_text(signed(said["log_odds"]))
    expect(verdict).to_contain_text(f"threshold {said['threshold']:g}")
    expect(verdict).to_contain_text("140 × 92 px")
    expect(verdict.locator(".warning")).to_have_count(len(said["warnings"]))
    track = verdict.locator(".rail").bounding_box()["width"]
    bar, tick = (verdict.locator(f".rail {name}").bounding_box() for name in "ib")
    assert bar["width"] / track == pytest.approx(said["probability_malignant"], abs=0.02)
    middle = tick["x"] + tick["width"] / 2 - verdict.locator(".rail").bounding_box()["x"]
    assert middle / track == pytest.approx(said["threshold"], abs=0.02)
    expect(page.locator("#table-box")).to_be_hidden()
    shot()


@pytest.mark.parametrize(
    "threshold", [0.5, *(pytest.param(edge, marks=pytest.mark.trial) for edge in (0.004, 0.996))]
)
def test_threshold_is_in_one_line_between_the_ends(
    page: Page, mock: page_mock.Mock, monkeypatch: pytest.MonkeyPatch, threshold: float
) -> None:
    monkeypatch.setitem(page_mock.CARD, "threshold", threshold)
    visit(page, mock.url)
    upload(page, file("field.png"))
    expect(page.locator("#verdict")).to_contain_text(f"threshold {threshold:g}")
    low, mark, high = (one.bounding_box() for one in page.locator(".rail-ends span").all())
    assert mark["height"] == low["height"]
    assert low["x"] + low["width"] < mark["x"]
    assert mark["x"] + mark["width"] < high["x"]


def test_many_images_are_in_a_table(page: Page, page_url: str, shot: Any) -> None:
    said = {one["name"]: answer(page_url, one) for one in SEVERAL}
    visit(page, page_url)
    upload(page, *SEVERAL)
    assert names(page) == list(said)
    assert column(page, 3) == [probability(one["probability_malignant"]) for one in said.values()]
    assert column(page, 4) == [signed(one["log_odds"]) for one in said.values()]
    expect(page.locator("#totals")).to_contain_text("5 images")
    shot()
    row(page, "field 3.png").locator("td").nth(3).click()
    expect(page.locator("#shown")).to_have_text("field 3.png")
    expect(page.locator("#verdict .number")).to_have_text(column(page, 3)[3])
    expect(page.locator("#place")).to_have_text("4 of 5")
    page.get_by_role("button", name="Next image").click()
    expect(page.locator("#shown")).to_have_text("field 4.png")


def test_the_table_sorts_both_ways_by_each_column(page: Page, page_url: str, shot: Any) -> None:
    said = {one["name"]: answer(page_url, one) for one in SEVERAL}
    visit(page, page_url)
    upload(page, *SEVERAL, BROKEN)
    values = {"image": {name: int(name[6]) for name in said}}
    for title, key in (("probability", "probability_malignant"), ("log-odds", "log_odds")):
        values[title] = {name: one[key] for name, one in said.items()}
    for title, of in values.items():
        for direction in ("ascending", "descending"):
            head(page, title).click()
            at = page.locator("#heads [aria-sort]")
            expect(at).to_have_count(1)
            expect(at).to_have_attribute("aria-sort", direction)
            found = [of[name] for name in names(page) if name in of]
            assert found == pytest.approx(sorted(of.values(), reverse=direction == "descending")), title
            if title != "image":
                # What has no number is last in both directions.
                assert names(page)[-1] == "cut.png"
    for title in ("class", "novelty", "warnings and errors"):
        head(page, title).click()
        expect(page.locator("#heads [aria-sort=ascending]")).to_have_text(title)
        assert len(names(page)) == 6
    shot()


def test_the_csv_holds_the_numbers_of_the_api(page: Page, page_url: str) -> None:
    files = [*SEVERAL, BROKEN]
    visit(page, page_url)
    upload(page, *files)
    with page.expect_download() as started:
        page.get_by_role("button", name="Download CSV").click()
    content = Path(started.value.path()).read_bytes()
    assert started.value.suggested_filename.endswith(".csv")
    assert content.count(b"\r\n") == content.count(b"\n") == len(files) + 1
    rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    numbers = ["probability_malignant", "log_odds", "threshold", "novelty", "novelty_cutoff"]
    numbers += ["width_px", "height_px"]
    texts = ["predicted_class", "model_id"]
    for one, found in zip(SEVERAL, rows, strict=False):
        said = answer(page_url, one)
        assert (found["name"], found["error"], found["error_message"]) == (one["name"], "", "")
        assert {name: found[name] for name in texts} == {name: said[name] for name in texts}
        for name in numbers:
            # As precise as the API itself; a busy GPU may add in another order.
            assert (float(found[name]) if found[name] else None) == pytest.approx(said[name], rel=1e-4), name
        assert found["warnings"] == "; ".join(warning["message"] for warning in said["warnings"])
    assert rows[-1]["name"] == "cut.png"
    assert rows[-1]["error"] == "truncated"
    assert rows[-1]["error_message"]
    assert rows[-1]["probability_malignant"] == rows[-1]["log_odds"] == ""


def test_broken_files_do_not_hold_up_the_good_ones(page: Page, page_url: str, shot: Any) -> None:
    empty = {"name": "empty.png", "mimeType": "image/png", "buffer": b""}
    visit(page, page_url)
    upload(page, SEVERAL[0], BROKEN, SEVERAL[1], TEXT, empty, SEVERAL[2])
    expect(page.locator("#totals")).to_contain_text("3 not scored")
    expect(row(page, "cut.png")).to_contain_text("Damaged or cut short")
    expect(row(page, "notes.txt")).to_contain_text("Not a readable image")
    expect(row(page, "empty.png")).to_contain_text("An empty file")
    assert sum(bool(text) for text in column(page, 3)) == 3
    page.get_by_role("button", name="cut.png").click()
    expect(page.locator("#verdict .failure")).to_contain_text("Damaged or cut short")
    expect(page.locator("#controls")).to_be_hidden()
    settle(page)
    shot()
    # Of no use here: the files themselves are broken.
    expect(page.locator("#again")).to_be_hidden()


def test_a_tiff_is_shown_through_the_service(page: Page, page_url: str, shot: Any) -> None:
    one = file("scan.tif", 92, 140, kind="TIFF")
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    visit(page, page_url)
    upload(page, SEVERAL[0], one)
    # Only what the browser cannot decode costs a preview.
    assert sum("preview=true" in url for url in sent) == 1
    page.get_by_role("button", name="scan.tif").click()
    settle(page)
    page.get_by_label("Side by side").check()
    np.testing.assert_array_equal(pixels(page, "#plain"), image.decode(one["buffer"]))
    assert np.abs(pixels(page).astype(int) - pixels(page, "#plain")).max() > 5
    shot()


SIZES = [(300, 200, "PNG"), (46, 70, "PNG"), (3, 1_000, "PNG"), (4, 5, "PNG"), (460, 700, "JPEG")]


@pytest.mark.parametrize(
    ("page_url", "height", "width", "kind"),
    [
        *(("mock", *size) for size in SIZES),
        ("service", *SIZES[0]),
        *(pytest.param("service", *size, marks=pytest.mark.trial) for size in SIZES[1:]),
    ],
    indirect=["page_url"],
)
def test_the_canvas_equals_the_overlay_of_the_archive_job(
    page: Page, page_url: str, height: int, width: int, kind: str
) -> None:
    one = file("field", height, width, 0.8, kind)
    card = get_json(f"{page_url}/v1/model")["card"]
    evidence = np.array(answer(page_url, one)["evidence"]["values"])
    into = card["input_height_px"], card["input_width_px"]
    decoded = image.decode(one["buffer"])
    visit(page, page_url)
    upload(page, one)
    expected = overlay.overlay(decoded, evidence, overlay.LIMIT, *into).astype(int)
    assert np.abs(pixels(page) - expected).max() <= 3
    served = get_json(f"{page_url}/v1/predict?overlay=true", one["buffer"])["overlay_png"]
    assert np.abs(pixels(page) - image.decode(base64.b64decode(served)).astype(int)).max() <= 3


def test_a_colour_profile_is_followed_as_the_model_follows_it(page: Page, page_url: str) -> None:
    content = pictures.encode(pictures.gradient(46, 70), icc_profile=SWAPPED)
    visit(page, page_url)
    upload(page, {"name": "a.png", "mimeType": "image/png", "buffer": content})
    page.get_by_label("Side by side").check()
    read = image.decode(content).astype(int)
    assert np.abs(read - pictures.gradient(46, 70)).max() > 100
    assert np.abs(pixels(page, "#plain") - read).max() <= 3


def test_the_slider_sets_the_strength_of_all_overlays(page: Page, page_url: str, shot: Any) -> None:
    one, other = file("one.png", 92, 140), file("other.png", 92, 140, 0.3)
    visit(page, page_url)
    upload(page, one, other)
    expect(page.locator("#opacity")).to_have_value("80")
    strong, legend = pixels(page), pixels(page, "#scale")
    thumb = pixels(page, "#rows tr:nth-child(2) canvas")
    page.get_by_role("slider", name="Evidence").fill("0")
    expect(page.locator("#opacity-text")).to_have_text("0 %")
    decoded = image.decode(one["buffer"])
    wait_for(lambda: (pixels(page) == decoded).all(), 60, "the image without colour")
    assert (strong != decoded).any()
    wait_for(lambda: (pixels(page, "#scale") == 255).all(), 60, "a legend without colour")
    assert (pixels(page, "#rows tr:nth-child(2) canvas") != thumb).any()
    page.get_by_role("slider", name="Evidence").fill("80")
    wait_for(lambda: (pixels(page) == strong).all(), 60, "the colours back")
    # The legend: full blue, nothing, full vermilion.
    assert legend[0, 0, 2] > legend[0, 0, 0] + 100
    assert legend[0, legend.shape[1] // 2].min() > 250
    assert legend[0, -1, 0] > legend[0, -1, 2] + 100
    about = get_json(f"{page_url}/v1/model")["overlay"]
    expect(page.locator(".legend")).to_contain_text(about["unit"])
    expect(page.locator("#high")).to_have_text(f"+{about['limit']:g}")
    page.get_by_role("slider", name="Evidence").fill("100")
    wait_for(lambda: (pixels(page) != strong).any(), 60, "stronger colours")
    # The strength is common to all images.
    page.get_by_role("button", name="other.png").click()
    expect(page.locator("#opacity")).to_have_value("100")
    settle(page)
    shot()


def test_side_by_side(page: Page, page_url: str, shot: Any) -> None:
    one = file("field.png", 230, 350)
    visit(page, page_url)
    upload(page, one)
    expect(page.locator("#plain")).to_be_hidden()
    page.get_by_label("Side by side").check()
    expect(page.locator("#plain")).to_be_visible()
    np.testing.assert_array_equal(pixels(page, "#plain"), image.decode(one["buffer"]))
    left, right = (page.locator(name).bounding_box() for name in ("#plain", "#evidence"))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    assert left["width"] == pytest.approx(right["width"], abs=2)
    shot()
    page.get_by_label("Side by side").uncheck()
    expect(page.locator("#plain")).to_be_hidden()


def test_hostile_names_stay_text(page: Page, page_url: str, shot: Any) -> None:
    files = [file(name, 46, 70 + n) for n, name in enumerate(HOSTILE)]
    visit(page, page_url)
    upload(page, *files)
    assert names(page) == HOSTILE
    assert page.locator("main img").count() == 0
    expect(page.locator("#shown")).to_have_text(HOSTILE[0])
    with page.expect_download() as started:
        page.get_by_role("button", name="Download CSV").click()
    rows = list(csv.DictReader(io.StringIO(Path(started.value.path()).read_text(), newline="")))
    assert [found["name"] for found in rows] == [HOSTILE[0], *(f"'{name}" for name in HOSTILE[1:])]
    # Numbers stay numbers, below zero as well.
    for found, one in zip(rows, files, strict=True):
        assert float(found["log_odds"]) == pytest.approx(answer(page_url, one)["log_odds"], rel=1e-4)
    shot()


def test_images_are_dropped_and_pasted(page: Page, page_url: str) -> None:
    visit(page, page_url)
    give = """([type, content]) => {
        const data = new DataTransfer();
        const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
        data.items.add(new File([bytes], type + ".png", { type: "image/png" }));
        const options = { bubbles: true, cancelable: true };
        const event = type === "paste" ? new ClipboardEvent(type, { ...options, clipboardData: data })
            : new DragEvent(type, { ...options, dataTransfer: data });
        return !document.getElementById("drop").dispatchEvent(event);
    }"""
    content = base64.b64encode(SEVERAL[0]["buffer"]).decode()
    assert page.evaluate(give, ["dragover", content])
    expect(page.locator("#drop")).to_have_class(re.compile("over"))
    # The browser must not leave the page for the file.
    assert page.evaluate(give, ["drop", content])
    expect(page.locator("#drop")).not_to_have_class(re.compile("over"))
    expect(page.locator("#shown")).to_have_text("drop.png")
    page.evaluate(give, ["paste", content])
    expect(page.locator("#shown")).to_have_text("paste.png")
    settle(page)
    assert names(page) == ["drop.png", "paste.png"]


def test_clear_all(page: Page, page_url: str) -> None:
    visit(page, page_url)
    upload(page, *SEVERAL)
    page.get_by_role("button", name="Clear all").click()
    for part in ("#viewer", "#results", "#progress"):
        expect(page.locator(part)).to_be_hidden()
    expect(page.locator("#files")).to_be_focused()
    assert not names(page)
    # The same file may be added twice.
    upload(page, SEVERAL[0])
    expect(page.locator("#verdict .number")).to_be_visible()


def test_the_keyboard_is_enough(page: Page, page_url: str, shot: Any) -> None:
    visit(page, page_url)

    def tab_to(wanted: str, keys: str = "Tab") -> None:
        for _ in range(60):
            page.keyboard.press(keys)
            # The file input is not seen itself: its zone shows the focus for it.
            seen = """() => {
                const at = document.activeElement, shown = at.closest("#drop") ?? at;
                return [at.id || at.textContent, getComputedStyle(shown).outlineStyle];
            }"""
            name, outline = page.evaluate(seen)
            assert outline != "none" or name.strip() == page.locator("body").text_content().strip(), name
            if name == wanted:
                return
        raise AssertionError(f"{wanted} is not reached by {keys}")

    tab_to("files")
    shot("-focus")
    chooser(page).set_files(SEVERAL)
    settle(page)
    tab_to("next")
    page.keyboard.press("Enter")
    expect(page.locator("#shown")).to_have_text("field 1.png")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#shown")).to_have_text("field 2.png")
    tab_to("opacity")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#opacity-text")).to_have_text("79 %")
    tab_to("pair")
    page.keyboard.press("Space")
    expect(page.locator("#plain")).to_be_visible()
    tab_to("probability")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(page.locator("#heads [aria-sort]")).to_have_attribute("aria-sort", "descending")
    tab_to("field 3.png")
    page.keyboard.press("Enter")
    expect(page.locator("#shown")).to_have_text("field 3.png")
    expect(row(page, "field 3.png").get_by_role("button")).to_have_attribute("aria-current", "true")
    expect(row(page, "field 3.png").get_by_role("button")).to_be_focused()
    tab_to("clear", "Shift+Tab")
    shot()
    page.keyboard.press("Enter")
    expect(page.locator("#viewer")).to_be_hidden()


def test_what_happens_is_said_aloud(page: Page, page_url: str) -> None:
    visit(page, page_url)
    upload(page, *SEVERAL, BROKEN)
    expect(page.get_by_role("status").filter(has_text="6 of 6 done, 1 not scored")).to_be_attached()
    for control in page.locator("main :is(button, input, canvas:not([aria-hidden]))").all():
        named = "e => e.textContent || e.ariaLabel || [...e.labels ?? []].map((l) => l.textContent).join('')"
        assert control.evaluate(named).strip(), control
    expect(page.get_by_role("alert").filter(visible=True)).to_have_count(0)


@pytest.mark.parametrize("page", [{"viewport": {"width": 360, "height": 740}}], indirect=True, ids=["360px"])
def test_a_narrow_window(page: Page, page_url: str, shot: Any) -> None:
    visit(page, page_url)
    width = "document.scrollingElement.scrollWidth"
    assert page.evaluate(width) <= 360
    page.get_by_text("More about this model").click()
    upload(page, file("a_very_long_name_without_any_space_" * 4 + ".png", 92, 140), *SEVERAL, BROKEN)
    assert page.evaluate(width) <= 360
    shot()
    page.get_by_label("Side by side").check()
    assert page.evaluate(width) <= 360
    page.get_by_role("button", name="cut.png").click()
    expect(page.locator("#verdict .failure")).to_be_visible()
    assert page.evaluate(width) <= 360
    assert page.locator("#table-box").evaluate("box => box.scrollWidth <= box.clientWidth")
    # Class, probability and notes of each image are seen without scrolling sideways.
    for number in (2, 3, 6):
        for cell in page.locator(f"#rows tr td:nth-child({number}):not(:empty)").all():
            box = cell.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360


@pytest.mark.parametrize("page", [{"viewport": {"width": 690, "height": 1000}}], indirect=True, ids=["A4"])
def test_nothing_is_cut_in_print(page: Page, page_url: str) -> None:
    """A4 has 718 px between usual margins."""
    visit(page, page_url)
    upload(page, file("a_very_long_name_without_any_space_" * 4 + ".png", 92, 140), *SEVERAL, BROKEN, TEXT)
    page.emulate_media(media="print")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 690
    cut = "box => box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1"
    for box in page.locator("#table-box, #rows td, #verdict .warning, .banner").all():
        assert not box.evaluate(cut), box.inner_text()
    assert page.locator("#drop, #csv, #opacity, #steps").filter(visible=True).count() == 0
    assert page.locator("#scale").is_visible()


CONTRAST = """() => {
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = (colour) => numbers(colour).slice(0, 3).map((c) => c / 255)
        .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const paper = (e) => {
        const own = getComputedStyle(e).backgroundColor;
        return (numbers(own)[3] ?? 1) === 1 || !e.parentElement ? own : paper(e.parentElement);
    };
    return [...document.querySelectorAll("main *")]
        .filter((e) => e.checkVisibility())
        .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
        .map((e) => [light(getComputedStyle(e).color), light(paper(e)), e.outerHTML.slice(0, 80)])
        .map(([a, b, what]) => [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), what]);
}"""


@pytest.mark.parametrize("page", [{"color_scheme": c} for c in ("light", "dark")], indirect=True, ids=str)
def test_light_and_dark_are_readable(page: Page, page_url: str, shot: Any) -> None:
    visit(page, page_url)
    upload(page, *SEVERAL, BROKEN)
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == dark
    # WCAG 2, level AA.
    assert not [(round(ratio, 2), what) for ratio, what in page.evaluate(CONTRAST) if ratio < 4.5]
    shot()


# ---- on the mock: a service under stress -------------------------------------------------------------------


def test_the_token_is_asked_for_and_kept_in_the_tab(page: Page, shot: Any) -> None:
    with page_mock.running("right-token") as mock:
        page.goto(mock.url)
        token = page.get_by_label("Token", exact=True)
        expect(token).to_be_focused()
        expect(token).to_have_attribute("type", "password")
        expect(page.locator("#access-error")).to_be_empty()
        shot("-asked")
        for wrong in ("wrong", "größer", "two words"):
            token.fill(wrong)
            token.press("Enter")
            expect(page.locator("#access-error")).not_to_be_empty()
            expect(token).to_have_value("")
            expect(token).to_be_focused()
        shot("-wrong")
        page.set_input_files("#files", [SEVERAL[1]])
        token.fill("right-token")
        page.get_by_role("button", name="Continue").click()
        expect(page.locator("#work")).to_be_visible()
        expect(page.locator("#access")).to_be_hidden()
        settle(page)
        # What was given before the token is not lost.
        expect(page.locator("#shown")).to_have_text(SEVERAL[1]["name"])
        expect(page.locator("#verdict .number")).to_be_visible()
        upload(page, SEVERAL[0])
        expect(page.locator("#verdict .number")).to_be_visible()
        page.reload()
        expect(page.locator("#work")).to_be_visible()
        assert not [line for line in mock.asked if "token" in line]
        assert page.evaluate("localStorage.length") == 0
        page.get_by_role("button", name="Forget the token").click()
        expect(page.locator("#work")).to_be_hidden()
        expect(token).to_be_focused()
        assert page.evaluate("sessionStorage.length") == 0
        page.reload()
        expect(token).to_be_visible()


def test_a_token_that_has_expired_is_requested(page: Page, mock: page_mock.Mock, shot: Any) -> None:
    visit(page, mock.url)
    page.set_input_files("#files", [SEVERAL[0], file("refused.png", 34), *SEVERAL[1:]])
    expect(page.locator("#access-error")).to_have_text("The service no longer accepts the token.")
    shot()
    page.get_by_label("Token", exact=True).fill("another")
    page.keyboard.press("Enter")
    expect(page.locator("#access")).to_be_hidden()
    settle(page)
    # Nothing in flight is lost.
    assert all(column(page, 3))


def test_requests_to_an_overloaded_service_are_retried(page: Page, mock: page_mock.Mock, shot: Any) -> None:
    visit(page, mock.url)
    upload(page, file("twice.png", 31), SEVERAL[0])
    assert all(column(page, 3))
    assert sum("POST" in line for line in mock.asked) == 4


@pytest.mark.trial
def test_a_service_that_stays_overloaded_is_given_up_and_tried_later(
    page: Page, mock: page_mock.Mock, shot: Any
) -> None:
    visit(page, mock.url)
    upload(page, file("never.png", 32), SEVERAL[0])
    assert sum("POST" in line for line in mock.asked) == 1 + 5 + 1
    expect(row(page, "never.png")).to_contain_text("The service is too busy")
    shot()
    page.get_by_role("button", name="Send again (1)").click()
    settle(page)
    assert sum("POST" in line for line in mock.asked) == 1 + 6 + 6


def test_four_at_once_progress_and_stop(page: Page, mock: page_mock.Mock, shot: Any) -> None:
    visit(page, mock.url)
    mock.gate.clear()
    page.set_input_files("#files", SEVERAL + [file(f"more {n}.png", 46, 90 + n) for n in range(5)])
    expect(page.locator("#count")).to_have_text("0 of 10 done")
    wait_for(lambda: mock.most_at_once == 4, 60, "four requests at once")
    mock.gate.set()
    expect(page.locator("#count")).to_have_text("10 of 10 done")
    settle(page)
    mock.gate.clear()
    page.set_input_files("#files", [file(f"late {n}.png", 46, 110 + n) for n in range(6)])
    expect(page.locator("#count")).to_have_text("10 of 16 done")
    expect(page.get_by_role("progressbar")).to_be_visible()
    shot()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#progress")).to_be_hidden()
    expect(page.locator("#totals")).to_contain_text("6 not scored")
    expect(row(page, "late 5.png")).to_contain_text("Stopped")
    mock.gate.set()
    page.get_by_role("button", name="Send again (6)").click()
    settle(page)
    assert all(column(page, 3))
    assert mock.most_at_once <= 8, "four new ones beside four that the service had not yet let go"


@pytest.mark.trial
def test_clearing_while_images_are_sent_leaves_nothing(page: Page, mock: page_mock.Mock) -> None:
    visit(page, mock.url)
    mock.gate.clear()
    page.set_input_files("#files", SEVERAL)
    expect(page.locator("#count")).to_have_text("0 of 5 done")
    page.get_by_role("button", name="Clear all").click()
    mock.gate.set()
    upload(page, SEVERAL[1], SEVERAL[2])
    assert names(page) == ["field 1.png", "field 2.png"]
    assert all(column(page, 3))


def test_a_proxys_page_and_a_lost_network_are_errors_of_one_file(
    page: Page, mock: page_mock.Mock, shot: Any
) -> None:
    visit(page, mock.url)
    upload(page, file("proxy.png", 33), SEVERAL[0])
    expect(row(page, "proxy.png")).to_contain_text("HTTP status 502 and no explanation")
    page.context.set_offline(True)
    upload(page, SEVERAL[1])
    expect(row(page, "field 1.png")).to_contain_text("The service cannot be reached")
    shot()
    page.context.set_offline(False)
    page.get_by_role("button", name="Send again (2)").click()
    settle(page)
    assert all(column(page, 3))


def test_a_file_that_is_too_large_is_not_sent(page: Page, mock: page_mock.Mock) -> None:
    most = mock.about["limits"]["max_body_bytes"] = 2**19
    visit(page, mock.url)
    upload(page, {"name": "large.png", "mimeType": "image/png", "buffer": bytes(most + 1)}, SEVERAL[0])
    expect(row(page, "large.png")).to_contain_text("The file is too large")
    expect(row(page, "large.png")).to_contain_text("0.5 MiB")
    assert sum("POST" in line for line in mock.asked) == 1


def test_a_service_that_is_not_there_yet(page: Page, mock: page_mock.Mock, shot: Any) -> None:
    page.route("**/v1/model", lambda route: route.abort())
    page.goto(mock.url)
    expect(page.get_by_role("alert")).to_contain_text("The service cannot be reached")
    shot()
    page.unroute("**/v1/model")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#work")).to_be_visible()
    expect(page.locator("#trouble")).to_be_hidden()


@pytest.mark.trial
def test_leaky_and_unmeasured_models_say_so(page: Page, mock: page_mock.Mock, shot: Any) -> None:
    mock.about["card"] |= {"leaky": True, "protocol": "image", "metrics": {}, "mpp": [], "magnifications": []}
    visit(page, mock.url)
    expect(page.locator("#banners")).to_contain_text("Leaky model.")
    expect(page.locator("#banners")).to_contain_text("Synthetic model.")
    expect(page.locator("#facts")).to_contain_text("not measured")
    expect(page.locator("#facts")).to_contain_text("unknown magnification")
    shot()


def test_too_few_patients_replace_the_accuracy(page: Page, mock: page_mock.Mock) -> None:
    why = "2 benign and 9 malignant patients are too few to estimate how often the model is right on others"
    mock.about["card"]["metrics"]["too_few_patients"] = why
    mock.about["card"]["metrics"]["summary"][0][2] = "2 patients: too few to say"
    visit(page, mock.url)
    expect(page.locator("#facts")).to_contain_text("2 patients: too few to say")
    expect(page.locator("#facts")).to_contain_text(why)
    expect(page.locator("#facts")).not_to_contain_text("91.7")


def test_the_error_of_a_whole_slide_names_the_job_for_it(page: Page, mock: page_mock.Mock) -> None:
    visit(page, mock.url)
    upload(page, SEVERAL[0], SEVERAL[1] | {"name": "slide.MRXS"})
    expect(row(page, "slide.MRXS")).to_contain_text("A whole slide")
    expect(row(page, "slide.MRXS")).to_contain_text("jobs/score.py")
    assert sum("POST" in line for line in mock.asked) == 1


@cache
def reports() -> tuple[str, str]:
    """A gallery and a report of a model."""
    facts = test_gallery.FACTS | {"synthetic": True, "leaky": True}
    report = test_model_report.without_figures(test_model_report.of(1, 3))
    return test_gallery.page(facts=facts), report


@pytest.fixture
def slide_jobs(tmp_path: Path) -> SlideJobs:
    """Slides of the service at `slides_url`; the test is what scores them."""
    return SlideJobs(str(tmp_path / "slides"), None, 16)


@pytest.fixture
def slides_url(slide_jobs: SlideJobs) -> Iterator[str]:
    """A service that takes slides of up to 1 MiB."""
    limits = Limits(max_body_bytes=2**19, slides=slide_jobs.uri, max_slide_bytes=2**20)
    engine = SimpleNamespace(card=card(), model_id="9f2c4e81a07b35d6")
    app = api.create_app(engine, limits, 4, slide_jobs)  # type: ignore[arg-type]
    with service.serving(middleware.guarded(app, limits, None)) as url:
        yield url


def finish_slide(jobs: SlideJobs, job_id: str, name: str) -> None:
    """What the archive job writes, with the tissue of a gradient."""
    row = {
        schema.SLIDE: name,
        schema.URI: "/secret",
        schema.WIDTH_PX: 40_000,
        schema.HEIGHT_PX: 30_000,
        schema.MPP: 0.25,
        schema.MPP_Y: 0.25,
        schema.TILES: 1_234,
        schema.BACKGROUND_TILES: 10,
        schema.ERROR_TILES: 0,
        schema.WARNED_TILES: 7,
        schema.MALIGNANT_TILE_SHARE: 0.125,
        schema.TISSUE_AREA_MM2: 41.25,
    }
    output = jobs.folder(job_id, "output")
    storage.write_table(f"{output}/slides.parquet", pa.Table.from_pylist([row], schema.SLIDES))
    folder = f"{output}/{ledger.slide_folder(name)}"
    storage.write_bytes(f"{folder}/{ledger.HEATMAP}", pictures.encode(pictures.gradient(300, 400)))
    storage.write_bytes(f"{folder}/{ledger.GEOJSON}", b"{}")
    storage.write_bytes(f"{output}/summary.json", b'{"model_id": "9f2c4e81a07b35d6"}')


@pytest.mark.parametrize(
    "page", [{}, {"viewport": {"width": 390, "height": 800}, "color_scheme": "dark"}], indirect=True
)
def test_a_slide_is_followed_to_its_heat_map(
    page: Page, slides_url: str, slide_jobs: SlideJobs, shot: Any
) -> None:
    page.goto(slides_url)
    expect(page.locator("#drop-limits")).to_contain_text("whole slides up to 1 MiB")
    first, *others = (
        {"name": name, "mimeType": "", "buffer": b"x" * size}
        for name, size in (("a.svs", 5), ("b.tif", 2**19 + 1), ("c.svs", 2**20 + 1))
    )
    page.set_input_files("#files", [first])
    cards = page.locator("#slides > li")
    expect(cards.nth(0)).to_contain_text("waiting")
    page.set_input_files("#files", others)
    expect(cards.nth(1)).to_contain_text("waiting, 1 before it")
    expect(cards.nth(2)).to_contain_text("accepts slides of 1 MiB")
    one, two = slide_jobs.waiting()
    slide_jobs.note(one, "progress.json", {"message": "0 of 1 input", "rows": 500, "share": 0.4})
    expect(cards.nth(0)).to_contain_text("being scored, 40 %")
    shot("-running")
    finish_slide(slide_jobs, one, "a.svs")
    slide_jobs.forget_waiting(one)
    expect(cards.nth(0).locator("img")).to_have_js_property("naturalWidth", 400)
    expect(cards.nth(0)).to_contain_text("12.5 %")
    expect(cards.nth(0)).to_contain_text("1,234")
    shot("-done")
    with page.expect_download() as download:
        cards.nth(0).get_by_role("button", name="Tiles for QuPath").click()
    assert download.value.suggested_filename == f"a.svs.{ledger.GEOJSON}"
    # This service has no viewer.
    assert cards.nth(0).get_by_role("link").count() == 0
    page.reload()  # the tab knows its slides
    expect(cards).to_have_count(2)
    expect(cards.nth(0)).to_contain_text("12.5 %")
    cards.nth(1).get_by_role("button", name="Cancel").click()
    expect(cards.nth(1)).to_contain_text("cancelled")
    assert slide_jobs.state(two) == "cancelled"
    cards.nth(0).get_by_role("button", name="Delete").click()
    expect(cards).to_have_count(1)
    assert not storage.exists(slide_jobs.folder(one))


def test_a_folder_that_is_dropped_gives_its_images(page: Page, mock: page_mock.Mock) -> None:
    """In folders below it, too; what is no image in a folder is left out."""
    page.goto(mock.url)
    expect(page.locator("#drop")).to_be_visible()
    page.evaluate(
        """(content) => {
            const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
            const file = (name) => ({ isFile: true, name, file: (done) => done(new File([bytes], name)) });
            const folder = (name, all) => {
                const parts = [all.slice(0, 1), all.slice(1), []];
                const readEntries = (done) => done(parts.shift() ?? []);
                return { isDirectory: true, name, createReader: () => ({ readEntries }) };
            };
            const top = folder("case", [file("a.png"), file("Thumbs.db"), folder("deep", [file("b.png")])]);
            const event = new Event("drop", { bubbles: true, cancelable: true });
            const items = [{ webkitGetAsEntry: () => top }];
            const value = { items, files: [bytes], types: ["Files"] };
            Object.defineProperty(event, "dataTransfer", { value });
            document.dispatchEvent(event);
        }""",
        base64.b64encode(file("a.png")["buffer"]).decode(),
    )
    expect(page.locator("#count")).to_have_text("2 of 2 done")
    assert page.locator("#rows .name").all_text_contents() == ["a.png", "b.png"]


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.trial)])
def test_reports_and_galleries_are_readable(browser: Any, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": 400, "height": 800})
    page = context.new_page()
    for html in reports():
        page.set_content(html)
        assert not [(round(ratio, 2), what) for ratio, what in page.evaluate(CONTRAST) if ratio < 4.5]
        # On a phone, what is most important is seen without scrolling sideways.
        for said in page.locator(".verdict b, .verdict .chip, .hero .says, .banner, .card .number").all():
            box = said.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 400
    context.close()


def test_the_mock_keeps_the_contract() -> None:
    api = pytest.importorskip("bcd.serving.api")
    api.ModelDocument.model_validate(page_mock.model_document())
    said = page_mock.document(SEVERAL[0]["buffer"], with_overlay=True, with_preview=True)
    assert api.Answer.model_validate(said).model_dump(mode="json") == said
    evidence = said["evidence"]
    assert np.mean(evidence["values"]) + evidence["bias"] == pytest.approx(said["log_odds"])


def test_the_tables_of_the_gallery_are_sorted_and_filtered(browser: Any, tmp_path: Path) -> None:
    """Numbers by value with the largest first, names as people count, what is unknown last; words filter."""
    rows = [
        gallery.GalleryRow("f10.png", None, "p1", "malignant", 0.91, 1.0),
        gallery.GalleryRow("f9.png", None, "p2", "benign", 0.2, 11.0, warned=True),
        gallery.GalleryRow("cut.png", None, None, error="truncated"),
        gallery.GalleryRow("f2.png", None, "p1", "benign", 0.05, 9.5),
    ]
    (tmp_path / "gallery.html").write_text(test_gallery.page(images=gallery.Images(rows, 4)), "utf-8")
    with contextlib.closing(browser.new_page(viewport={"width": 400, "height": 800})) as page:
        errors: list[Any] = []
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(f"file://{tmp_path}/gallery.html")
        box = page.locator("section[aria-label='All images']")

        def names() -> list[str]:
            return [row.inner_text() for row in box.locator("tbody tr:visible td:first-child").all()]

        assert names() == ["f10.png", "f9.png", "cut.png", "f2.png"]
        orders = {"novelty": "f9 f2 f10 cut", "image": "cut f2 f9 f10", "probability": "f10 f9 f2 cut"}
        for head, order in orders.items():
            box.get_by_role("button", name=head).click()
            assert [name[:-4] for name in names()] == order.split(), head
        box.get_by_role("button", name="probability").click()
        assert names() == ["f2.png", "f9.png", "f10.png", "cut.png"]
        assert box.locator("th[aria-sort=ascending]").inner_text().startswith("probability")
        box.get_by_role("searchbox").fill("P1 benign")
        assert names() == ["f2.png"]
        assert box.locator("output").inner_text() == "1 of 4"
        box.get_by_role("searchbox").fill("unlike")
        assert names() == ["f9.png"]
        assert errors == []
        # A phone needs no scrolling sideways.
        assert page.evaluate("document.documentElement.scrollWidth") == 400


def test_the_documentation_works_under_its_policy(page, shot):
    """Swagger UI, with its inline script and its styles, from the service alone."""
    engine = SimpleNamespace(card=card(), model_id="abc")
    with service.serving(service.guarded(engine, token=None)) as url:
        page.goto(f"{url}/docs")
        sync_api.expect(page.locator(".opblock")).to_have_count(9)
        page.locator(".opblock-summary").first.click()
        sync_api.expect(page.get_by_text("One image (PNG, JPEG or TIFF) as raw body")).to_be_visible()
        shot()
