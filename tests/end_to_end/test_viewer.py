"""The viewer in a real browser: what its list finds, what its map shows, and numbers to the digit."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from bcd import schema, storage
from bcd.config.serving import ServiceConfig
from bcd.imaging import image
from bcd.metrics import calibration
from bcd.reports import heatmap
from bcd.scoring import ledger
from bcd.serving import api, front, middleware
from bcd.serving.slide_jobs import SlideJobs, jobs_of
from bcd.serving.viewer import scored
from bcd.serving.viewer import service as viewer_service
from bcd.serving.viewer.app import create_viewer
from bcd.taxonomy import TUMOR_CLASSES
from tests import service, viewed
from tests.end_to_end import test_page
from tests.model.test_bundle import card

pytestmark = test_page.pytestmark
expect, Page = test_page.expect, test_page.Page
browser, page, shot = test_page.browser, test_page.page, test_page.shot

PHONE = {"viewport": {"width": 390, "height": 800}, "device_scale_factor": 2, "has_touch": True}
DARK = {"color_scheme": "dark"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> viewed.Made:
    return viewed.make(str(tmp_path_factory.mktemp("viewed")))


@pytest.fixture(scope="module")
def url(made: viewed.Made) -> Iterator[str]:
    with service.serving(middleware.Guard(create_viewer(scored.Outputs(made.uri)))) as found:
        yield found


@pytest.fixture(scope="module")
def locked(made: viewed.Made) -> Iterator[str]:
    """A viewer with a token."""
    app = create_viewer(scored.Outputs(made.uri))
    with service.serving(middleware.Guard(app, token_digest=middleware.digest(service.TOKEN))) as found:
        yield found


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A viewer of a pseudonymised output."""
    found = viewed.make(str(tmp_path_factory.mktemp("hidden")), hidden=True)
    with service.serving(middleware.Guard(create_viewer(scored.Outputs(found.uri)))) as url:
        yield url


def address(url: str, name: str = viewed.SLIDE, place: str = "") -> str:
    return f"{url}/slides/{quote(name, safe='')}{place}"


def visit(page: Page, where: str) -> None:
    """Open an input, and wait until its pixels and its map are there."""
    page.goto("about:blank")
    page.goto(where)
    expect(page.locator("#stage")).to_have_attribute("aria-busy", "false")
    expect(page.locator("#facts dl")).to_be_visible()


def names(page: Page) -> list[str]:
    return page.locator("#rows td.name").all_inner_texts()


def numbers(page: Page) -> dict[str, str]:
    """What the page says of a tile or field."""
    cells = page.locator("#tile dd")
    return {cell.get_attribute("data-of"): cell.inner_text() for cell in cells.all()}


def middle(page: Page) -> tuple[float, float]:
    box = page.locator("#stage").bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


NUMBERS = {
    "probability": schema.PROBABILITY_MALIGNANT,
    "novelty": schema.NOVELTY,
    "usual up to": schema.NOVELTY_CUTOFF,
}


def check(found: dict[str, str], row: dict[str, Any]) -> None:
    """Compare with the row of the table: the shortest text of each number."""
    for name, column in NUMBERS.items():
        assert found[name] == np.format_float_positional(np.float32(row[column]), unique=True, trim="-")
    assert float(found["log-odds"]) == calibration.log_odds([row[schema.LOGIT]], TUMOR_CLASSES)[0]
    assert (found["class"], found["id"]) == (row[schema.PREDICTED_CLASS], row[schema.IMAGE_ID])


def open_sent(page: Page) -> Page:
    """The viewer, from the card of a slide on the service's page: a tab of its own, which has the token."""
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="Open in the viewer").click(timeout=test_page.PATIENCE_MS)
    found = opened.value
    expect(found.locator("#stage")).to_have_attribute("aria-busy", "false", timeout=test_page.PATIENCE_MS)
    expect(found.locator("#facts dl")).to_be_visible(timeout=test_page.PATIENCE_MS)
    return found


def read_tile(page: Page, x: int, y: int) -> dict[str, str]:
    """Numbers of the tile at a place of level 0."""
    page.evaluate("(place) => { location.hash = place; }", f"{x},{y},1")
    page.mouse.move(2, 2)
    page.mouse.move(*middle(page))
    expect(page.locator("#tile dl")).to_be_visible(timeout=test_page.PATIENCE_MS)
    return numbers(page)


def test_the_list_is_sorted_and_filtered_by_the_server(page: Page, url: str, made: Any, shot: Any) -> None:
    page.goto(f"{url}/slides")
    expect(page.locator("#total")).to_have_text("2 slides found")
    assert names(page) == [viewed.SLIDE, viewed.BROKEN]
    shot()
    page.get_by_role("button", name="7 fields").click()
    expect(page.locator("#total")).to_have_text("7 fields found")
    fields = [row for name, row in made.rows.items() if name.startswith("field") and not row[schema.ERROR]]
    fields.sort(key=lambda row: -row[schema.PROBABILITY_MALIGNANT])
    assert names(page) == [*(row[schema.IMAGE_ID] for row in fields), "field 3.png"]
    page.get_by_role("button", name="novelty").click()
    fields.sort(key=lambda row: -row[schema.NOVELTY])
    expect(page.locator("#rows td.name").first).to_have_text(fields[0][schema.IMAGE_ID])
    expect(page.locator("th", has_text="novelty")).to_have_attribute("aria-sort", "descending")
    shot("-fields")
    page.keyboard.press("/")
    page.keyboard.type("field 5")
    expect(page.locator("#total")).to_have_text("1 field found")
    page.locator("#text").fill("")
    page.get_by_label("Error").select_option("any")
    expect(page.locator("#rows td.name")).to_have_text(["field 3.png"])
    # Back from a field, the list is as it was.
    page.get_by_role("link", name="field 3.png").click()
    expect(page.locator("#note")).to_contain_text("It was not scored: truncated.")
    page.get_by_role("link", name="All inputs").click()
    expect(page.locator("#rows td.name")).to_have_text(["field 3.png"])


def test_a_tiles_numbers_are_those_of_the_table_to_the_digit(
    page: Page, url: str, made: Any, shot: Any
) -> None:
    tiles = made.tiles()
    seen = 0
    for row in (tiles[0], tiles[20], tiles[-1], *(row for row in tiles if row[schema.ERROR])):
        x = row[schema.X_LEVEL0_PX] + viewed.TILE_WIDTH_PX
        y = row[schema.Y_LEVEL0_PX] + viewed.TILE_HEIGHT_PX
        visit(page, address(url, place=f"#{x},{y},1.5"))
        page.mouse.move(*middle(page))
        expect(page.locator("#tile dl")).to_be_visible()
        found = numbers(page)
        assert (found["x"], found["y"]) == (str(row[schema.X_LEVEL0_PX]), str(row[schema.Y_LEVEL0_PX]))
        if row[schema.ERROR]:
            assert (found["not scored"], found["id"]) == ("truncated", row[schema.IMAGE_ID])
            assert "probability" not in found
        else:
            check(found, row)
            seen += 1
    assert seen == 3
    page.mouse.move(2, 2)
    expect(page.locator("#hint")).to_be_visible()


def test_a_tile_that_is_unlike_the_training_data_has_a_warning(page: Page, url: str, made: Any) -> None:
    row = next(row for row in made.tiles() if row[schema.WARNINGS])
    visit(page, address(url, place=f"#{row[schema.X_LEVEL0_PX] + 50},{row[schema.Y_LEVEL0_PX] + 40},1"))
    page.mouse.click(*middle(page))
    page.mouse.move(2, 2)
    # What was clicked stays.
    expect(page.locator("#tile .warning")).to_contain_text("Unlike the training data")
    check(numbers(page), row)


def pixels(page: Page) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.locator("#stage").screenshot())).convert("RGB"))


def test_the_map_has_the_colours_of_the_heat_map_and_fades(
    page: Page, url: str, made: Any, shot: Any
) -> None:
    tiles = [row for row in made.tiles() if not row[schema.ERROR] and not row[schema.WARNINGS]]
    chosen = [min(tiles, key=lambda row: row[schema.PROBABILITY_MALIGNANT])]
    chosen += [max(tiles, key=lambda row: row[schema.PROBABILITY_MALIGNANT])]
    for row in chosen:
        x, y = row[schema.X_LEVEL0_PX], row[schema.Y_LEVEL0_PX]
        visit(page, address(url, place=f"#{x + 50},{y + 40},1"))
        page.mouse.move(2, 2)
        plain = made.pixels[y + 20 : y + 60, x + 25 : x + 75].mean((0, 1))
        box = np.array([[0, 0, 900, 700]], float)
        probability = np.array([row[schema.PROBABILITY_MALIGNANT]])
        drawn = heatmap.draw_tiles(made.pixels, 1, box, probability, viewed.THRESHOLD)
        expected = drawn[y + 20 : y + 60, x + 25 : x + 75].mean((0, 1))
        # CSS weighs the colours of its grey otherwise than Pillow.
        np.testing.assert_allclose(centre(page), expected, atol=8)
        page.keyboard.press("o")
        expect(page.locator("#opacity-text")).to_have_text("0 %")
        np.testing.assert_allclose(centre(page), plain, atol=4)
        page.keyboard.press("o")
        expect(page.locator("#opacity-text")).to_have_text("85 %")
    page.locator("#opacity").fill("40")
    shot()
    found = centre(page)
    assert (np.minimum(plain, expected) - 8 < found).all()
    assert (found < np.maximum(plain, expected) + 8).all()


def centre(page: Page) -> np.ndarray:
    """Mean colour of the middle of a tile in the middle of the view."""
    found = pixels(page)
    y, x = (side // 2 for side in found.shape[:2])
    return found[y - 20 : y + 20, x - 25 : x + 25].mean((0, 1))


def test_keys_move_zoom_and_turn_the_page(page: Page, url: str, made: Any, shot: Any) -> None:
    visit(page, address(url))
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    shot()
    page.keyboard.press("Escape")
    page.keyboard.press("+")
    page.keyboard.press("ArrowRight")
    # The tile in the middle is read, and the address is that of the view.
    expect(page.locator("#tile dl")).to_be_visible()
    x, y, zoom = map(float, page.url.rpartition("#")[2].split(","))
    tile = made.rows[numbers(page)["id"]]
    assert 0 <= x - tile[schema.X_LEVEL0_PX] <= 100
    assert 0 <= y - tile[schema.Y_LEVEL0_PX] <= 80
    assert zoom > 0.9
    page.keyboard.press("n")
    expect(page.locator("#name")).to_have_text(viewed.BROKEN)
    expect(page.locator("#note")).to_contain_text("unreadable")
    page.keyboard.press("p")
    expect(page.locator("#name")).to_have_text(viewed.SLIDE)
    expect(page.locator("#place")).to_have_text("1 of 2")
    page.keyboard.press("/")
    expect(page.locator("#text")).to_be_focused()


def test_a_field_has_its_evidence_over_it(page: Page, url: str, made: Any, shot: Any) -> None:
    visit(page, address(url, "field 2.png"))
    expect(page.locator("#opacity-text")).to_have_text("80 %")
    check(numbers(page), made.rows["field 2.png"])
    with_evidence = pixels(page)
    page.keyboard.press("o")
    expect(page.locator("#opacity-text")).to_have_text("0 %")
    expect(page.locator("#map")).to_be_visible()
    assert np.abs(with_evidence.astype(int) - pixels(page)).max() > 20
    shot()


def test_the_token_is_asked_for_and_sent_with_each_tile(page: Page, locked: str, shot: Any) -> None:
    page.goto(address(locked))
    expect(page.get_by_label("Token")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#access-error")).to_have_text("The viewer does not accept this token.")
    shot()
    page.get_by_label("Token").fill(service.TOKEN)
    page.keyboard.press("Enter")
    expect(page.locator("#stage")).to_have_attribute("aria-busy", "false")
    page.keyboard.press("o")
    assert pixels(page).std() > 5  # tissue, and not white


def test_a_pseudonymised_slide_is_a_map_without_pixels(page: Page, hidden: str, shot: Any) -> None:
    visit(page, address(hidden))
    expect(page.locator("#banners")).to_contain_text("The output is pseudonymised")
    expect(page.locator("#heat-map-image")).to_be_visible()
    assert pixels(page).std() > 20
    shot()


@pytest.mark.parametrize("page", [PHONE, DARK, PHONE | DARK], indirect=True, ids=["phone", "dark", "both"])
def test_it_fits_every_screen(page: Page, url: str, shot: Any) -> None:
    visit(page, address(url))
    shot()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.goto(f"{url}/slides?kind=fields&sort=probability")
    expect(page.locator("#total")).to_have_text("7 fields found")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shot("-list")


def test_names_are_text_and_no_markup(page: Page, url: str) -> None:
    name = "<img src=x onerror=alert(1)>"
    page.goto(address(url, name))
    expect(page.locator("#trouble-text")).to_have_text("The output has no input of this name.")
    expect(page.locator("#name")).to_have_text(name)


def test_a_map_of_100_000_tiles_is_one_bitmap_until_few_of_them_are_in_view(page: Page, url: str) -> None:
    """Not one rectangle is drawn in a frame of all tiles, and only those in view where they are large."""
    visit(page, address(url))
    drawn = json.loads(page.locator("#stage").evaluate(DRAW))
    # 316 x 317 tiles of 12 px.
    assert drawn["bitmap"] == [3792, 3804]
    few, many = (drawn["rectangles"][name] for name in ("near", "far"))
    assert many == 0
    # 1600 x 1000 px with tiles of 51.2 px, each with its edge; at most one more on each side.
    assert 2 * 31 * 19 <= few <= 2 * 33 * 21
    print(f"a frame takes {min(drawn['medians']):.0f} to {max(drawn['medians']):.0f} ms, drawn without a GPU")


DRAW = """async () => {
  const { TileMap } = await import("/page/slides/tiles.js");
  const n = 100000, side = 316;
  const of = (make) => Float32Array.from({ length: n }, (_, i) => make(i));
  const x = of((i) => 512 * (i % side)), y = of((i) => 512 * Math.floor(i / side));
  const probability = of((i) => ((i * 7919) % 1000) / 1000);
  const tiles = { tiles: n, width: 512, height: 512, x, y, probability, warned: new Uint8Array(n) };
  const map = new TileMap(tiles, { colors: Array(257).fill("#0072b2"), edge: 0.86, hatch: 0.45 }, 0.5);
  const context = document.createElement("canvas").getContext("2d");
  [context.canvas.width, context.canvas.height] = [1600, 1000];
  map.draw(context, { left: 0, top: 0, scale: 0.005 });
  let rectangles = 0;
  const fill = context.fillRect.bind(context);
  context.fillRect = (...box) => (rectangles++, fill(...box));
  const counted = (scale) => {
    rectangles = 0;
    map.draw(context, { left: 40000, top: 40000, scale });
    return rectangles;
  };
  const found = { far: counted(0.02), near: counted(0.1) };
  const times = (scale) => Array.from({ length: 9 }, (_, i) => {
    const start = performance.now();
    map.draw(context, { left: 40000 + 100 * i, top: 40000, scale });
    context.getImageData(0, 0, 1, 1);
    return performance.now() - start;
  });
  const median = (values) => values.sort((one, other) => one - other)[4];
  const medians = [0.01, 0.02, 0.03, 0.1, 1].map((scale) => median(times(scale)));
  const { width, height } = map.bitmap.canvas;
  return JSON.stringify({ bitmap: [width, height], rectangles: found, medians });
}"""


@pytest.fixture
def sent(tmp_path: Path) -> Iterator[tuple[str, SlideJobs]]:
    """A service and its folder of slides, with both of its applications; the test is what scores them."""
    config = ServiceConfig(model="m", slides=str(tmp_path / "slides"))
    limits, digest, jobs = front.limits_of(config), middleware.digest(service.TOKEN), jobs_of(config)
    engine: Any = SimpleNamespace(card=card(), model_id="9f2c4e81a07b35d6")
    model = middleware.guarded(api.create_app(engine, limits, 4, jobs), limits, digest)
    viewer = viewer_service.ViewerReplica.__base__(config, digest).__serve_build_asgi_app__()
    assert jobs
    with service.serving(service.routed({"/": model, viewer_service.PREFIX: viewer})) as found:
        yield found, jobs


NARROW = pytest.param(PHONE | DARK, marks=pytest.mark.trial, id="narrow")


@pytest.mark.parametrize("page", [pytest.param({}, id="wide"), NARROW], indirect=True)
def test_a_slide_is_dropped_followed_opened_faded_and_read(
    page: Page, sent: tuple[str, SlideJobs], shot: Any
) -> None:
    url, jobs = sent
    test_page.enter(page, url)
    test_page.drop(page, "a.svs", b"x")
    shown = page.locator("#slides > li")
    expect(shown).to_contain_text("waiting")
    (job_id,) = jobs.waiting()
    jobs.note(job_id, "progress.json", {"message": "0 of 1 input", "rows": 500, "share": 0.4})
    expect(shown).to_contain_text("being scored, 40 %")
    assert shown.get_by_role("link").count() == 0
    drawing = jobs.folder(job_id, "output", ledger.slide_folder("a.svs"), ledger.HEATMAP)
    storage.write_bytes(drawing, image.encode_png(viewed.slide_pixels()))
    made = viewed.make(jobs.folder(job_id, "made"), output=jobs.folder(job_id, "output"))
    viewer = open_sent(page)
    shot()
    row = next(row for row in made.tiles() if not row[schema.ERROR])
    x, y = row[schema.X_LEVEL0_PX], row[schema.Y_LEVEL0_PX]
    check(read_tile(viewer, x + 50, y + 40), row)
    with_map = pixels(viewer)
    viewer.locator("#opacity").fill("0")
    expect(viewer.locator("#opacity-text")).to_have_text("0 %")
    assert np.abs(with_map.astype(int) - pixels(viewer)).max() > 20
    # The place is an address for who has access; the list is that of the slide.
    assert f"?job={job_id}#" in viewer.url
    viewer.get_by_role("link", name="All inputs").click()
    expect(viewer.locator("#total")).to_have_text("1 slide found")
    viewer.get_by_role("button", name="7 fields").click()
    viewer.get_by_role("link", name="field 2.png").click()
    expect(viewer.locator("#opacity-text")).to_have_text("80 %")
    check(numbers(viewer), made.rows["field 2.png"])
    page.get_by_role("button", name="Delete").click()
    expect(shown).to_have_count(0)
    viewer.reload()
    expect(viewer.locator("#trouble-text")).to_have_text("This service knows no slide of this id.")
