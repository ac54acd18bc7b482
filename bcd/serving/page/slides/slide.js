// The page of one slide or field: its pixels, its map over them, and the numbers of the place that is pointed at.

import { decode, drawLegend, draw as put, laidOver, pixelsOf, strengthsOf } from "../picture.js";
import { answered, ask } from "../service.js";
import { element, make, plural, sentence, show, signed, words } from "../text.js";
import { authorization, loaded } from "./access.js";
import { banners, listOf, ofRow, ofSlide } from "./facts.js";
import { back, options, pageOf, placeOf } from "./order.js";
import { TileMap, shade, unpack } from "./tiles.js";

const name = decodeURIComponent(location.pathname.replace(/^.*?\/slides\//, ""));
const option = options({ name });
// Of the view: how far a key moves it, and by how much it zooms.
const [STEP, FACTOR] = [0.2, 1.5];
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
// Longest scale bar, and most pixels of a canvas per pixel of the page.
const [BAR_PX, MOST_RATIO] = [150, 2];
const INK = "#1f2328";

// `image` is OpenSeadragon's viewer; `map` a TileMap, or for a field its pixels and the strength of their evidence.
const state = { about: null, row: null, image: null, map: null, field: null, pinned: -1, pointed: -1, byKey: false, place: null, before: 85 };

const opacity = () => element("opacity").valueAsNumber / 100;
const ratio = () => Math.min(MOST_RATIO, window.devicePixelRatio || 1);

// ---- the view: coordinates are pixels of level 0 ----------------------------------------------------------------

/** Left and upper edge, and pixels of the page per pixel of level 0. */
function view() {
  const { viewport } = state.image;
  const bounds = viewport.getBounds(true);
  const width = state.row.width_px;
  return { left: bounds.x * width, top: bounds.y * width, scale: viewport.getContainerSize().x / bounds.width / width };
}

function placeAt(x, y) {
  const { left, top, scale } = view();
  return [left + x / scale, top + y / scale];
}

function centre() {
  const { clientWidth, clientHeight } = element("stage");
  return placeAt(clientWidth / 2, clientHeight / 2);
}

/** #x,y,zoom: the middle of the view, and pixels of the page per pixel of level 0. */
function goToHash() {
  const [x, y, zoom] = location.hash.slice(1).split(",").map(Number);
  if (![x, y, zoom].every(Number.isFinite) || zoom <= 0) return;
  const { viewport } = state.image;
  viewport.zoomTo((zoom * state.row.width_px) / viewport.getContainerSize().x, null, true);
  viewport.panTo(new OpenSeadragon.Point(x / state.row.width_px, y / state.row.width_px), true);
}

function keepHash() {
  const [x, y] = centre().map(Math.round);
  history.replaceState(null, "", `#${x},${y},${Number(view().scale.toPrecision(4))}`);
}

// ---- drawing ----------------------------------------------------------------------------------------------------

/** A canvas with as many pixels as the screen has there; setting a size clears it. */
function sized(id) {
  const canvas = element(id);
  const { clientWidth, clientHeight } = element("stage");
  const [width, height] = [Math.round(clientWidth * ratio()), Math.round(clientHeight * ratio())];
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  return canvas.getContext("2d");
}

function render() {
  const { left, top, scale } = view();
  const context = sized("map");
  if (state.map) state.map.draw(context, { left, top, scale: scale * ratio() });
  else if (state.field?.canvas) {
    const { width_px: width, height_px: height } = state.row;
    context.clearRect(0, 0, context.canvas.width, context.canvas.height);
    const factor = scale * ratio();
    context.drawImage(state.field.canvas, -left * factor, -top * factor, width * factor, height * factor);
  }
  renderMarks();
  renderScale(scale);
}

/** The frames of the tile that is pointed at and of the one that was chosen. */
function renderMarks() {
  const context = sized("marks");
  context.clearRect(0, 0, context.canvas.width, context.canvas.height);
  if (!state.map) return;
  const { left, top, scale } = view();
  const factor = scale * ratio();
  const { x, y, width, height } = state.map.tiles;
  for (const i of new Set([state.pinned, state.pointed])) {
    if (i < 0) continue;
    const box = [(x[i] - left) * factor, (y[i] - top) * factor, width * factor, height * factor];
    for (const [color, line] of [["#ffffff", 4], [INK, 2]]) {
      context.strokeStyle = color;
      context.lineWidth = line * ratio();
      context.strokeRect(...box);
    }
  }
}

/** A bar as long as a round number of µm on the slide. */
function renderScale(scale) {
  const { mpp } = state.row;
  show("scale", Boolean(mpp));
  if (!mpp) return;
  const most = (BAR_PX / scale) * mpp;
  const power = 10 ** Math.floor(Math.log10(most));
  const length = [5, 2, 1].map((step) => step * power).find((one) => one <= most);
  const [bar, text] = element("scale").children;
  bar.style.width = `${(length / mpp) * scale}px`;
  text.textContent = length >= 1000 ? `${length / 1000} mm` : `${Number(length.toPrecision(1))} µm`;
}

/** The strength of the map: of its colours, and as in the heat map the less the more of the slide's own. */
function fade() {
  element("opacity-text").textContent = `${element("opacity").value} %`;
  element("map").style.opacity = state.map ? opacity() : 1;
  if (state.map) {
    const part = Math.min(1, opacity() / state.about.map.strength);
    const paper = 1 - (1 - state.about.map.contrast) * part;
    element("image").style.filter = part ? `grayscale(${part}) opacity(${paper})` : "";
  } else if (state.field) layField();
}

let frame = 0;

function layField() {
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(() => {
    const { pixels, strengths } = state.field;
    state.field.canvas ??= document.createElement("canvas");
    put(state.field.canvas, laidOver(pixels, strengths, state.about.overlay, opacity()));
    drawLegend(element("legend"), state.about.overlay, opacity());
    if (state.image?.isOpen()) render();
  });
}

function setOpacity(percent) {
  element("opacity").value = percent;
  fade();
}

function toggle() {
  const now = element("opacity").valueAsNumber;
  if (now) state.before = now;
  setOpacity(now ? 0 : state.before);
}

// ---- numbers ----------------------------------------------------------------------------------------------------

function say(i) {
  show("hint", i < 0);
  if (i < 0) return element("tile").replaceChildren();
  const row = state.map.row(i);
  const inside = [listOf(ofRow(row, state.map.tiles.novelty_cutoff))];
  if (row.warned) inside.push(make("p", "Unlike the training data: the result may mean nothing.", { class: "warning" }));
  element("tile").replaceChildren(...inside);
}

function point(i) {
  if (i === state.pointed) return;
  state.pointed = i;
  say(i < 0 ? state.pinned : i);
  renderMarks();
}

function pin(i) {
  state.pinned = state.pointed = i;
  say(i);
  renderMarks();
}

// ---- opening ----------------------------------------------------------------------------------------------------

/** One image in place of tiles: that of a field, or white. */
function flat(url) {
  const { width_px: width, height_px: height } = state.row;
  return { width, height, tileSize: Math.max(width, height), minLevel: 0, maxLevel: 0, getTileUrl: () => url };
}

function white() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, 1, 1);
  return canvas.toDataURL();
}

function zoomable() {
  const { width_px: width, height_px: height, deep_zoom: { tile, overlap, last }, output_version: version } = state.row;
  // A level that fits into one tile is the first that is worth a request.
  const minLevel = Math.max(0, last - Math.ceil(Math.log2(Math.max(width, height) / tile)));
  const getTileUrl = (level, x, y) => `../v1/view/pixels/${level}/${x}_${y}?${option}&v=${encodeURIComponent(version)}`;
  return { width, height, tileSize: tile, tileOverlap: overlap, minLevel, maxLevel: last, getTileUrl };
}

const busy = (is) => element("stage").setAttribute("aria-busy", String(is));

function openImage(source, byRequest) {
  state.image?.destroy();
  busy(true);
  state.image = OpenSeadragon({
    element: element("image"),
    tileSources: source,
    tabIndex: "",
    drawer: "canvas",
    loadTilesWithAjax: byRequest,
    ajaxHeaders: authorization(),
    showNavigationControl: false,
    keyboardNavEnabled: false,
    imageLoaderLimit: 6,
    tileRetryMax: 3,
    tileRetryDelay: 1000,
    timeout: 120000,
    maxZoomPixelRatio: 8,
    visibilityRatio: 0.3,
    animationTime: matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 0.4,
    gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
  });
  state.image.addHandler("open", () => {
    const item = state.image.world.getItemAt(0);
    item.addHandler("fully-loaded-change", ({ fullyLoaded }) => busy(!fullyLoaded));
    goToHash();
    render();
  });
  state.image.addHandler("update-viewport", render);
  state.image.addHandler("animation-finish", settled);
  state.image.addHandler("canvas-click", ({ quick, position }) => {
    if (quick && state.map) pin(state.map.at(...placeAt(position.x, position.y)));
  });
  state.image.addOnceHandler("tile-load-failed", ({ tile }) => {
    answered(tile.getUrl(), { signal: AbortSignal.timeout(60000) }).catch((error) => note(`Some pixels cannot be read: ${error.message}.`));
  });
}

function settled() {
  keepHash();
  if (state.byKey && state.map) pin(state.map.at(...centre()));
  state.byKey = false;
}

function note(text) {
  show("note", Boolean(text));
  element("note").textContent = text;
}

async function openSlide() {
  const { row, about } = state;
  openImage(about.hidden ? flat(white()) : zoomable(), !about.hidden);
  const tiles = await (await answered(`../v1/view/tiles?${option}`)).arrayBuffer();
  state.map = new TileMap(unpack(tiles), about.map, about.threshold);
  element("map").classList.add("multiplied");
  renderScaleOfColors();
  setOpacity(100 * about.map.strength);
  element("facts").replaceChildren(listOf(ofSlide(row)));
  if (state.image.isOpen()) render();
  if (about.hidden) showHeatMap();
}

function renderScaleOfColors() {
  const { map: { colors }, threshold } = state.about;
  const canvas = element("legend");
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    context.fillStyle = colors[shade(x / (canvas.width - 1), threshold, colors.length)];
    context.fillRect(x, 0, 1, 1);
  }
  element("middle").textContent = `probability of malignancy; white: the threshold ${Number(threshold.toPrecision(3))}`;
  element("legend-note").textContent = "Uncoloured: not scored. Hatched: unlike the training data.";
}

async function showHeatMap() {
  const drawing = await (await answered(`../v1/view/heatmap?${option}`)).blob();
  element("heat-map-image").src = URL.createObjectURL(drawing);
  show("heat-map", true);
}

async function openField() {
  const { row, about } = state;
  const { overlay } = about;
  element("facts-title").textContent = "Field";
  const numbers = { ...row, id: row.image_id, probability: row.probability_malignant, predicted: row.predicted_class };
  element("tile-title").textContent = "Numbers";
  element("tile").replaceChildren(listOf(ofRow({ ...numbers, log_odds: row.explained?.log_odds ?? null }, row.novelty_cutoff)));
  element("facts").replaceChildren(listOf([["patient", row.patient], ...ofSlide({ ...row, tissue_area_mm2: null }).slice(-2)]));
  show("hint", false);
  show("mapping", Boolean(row.explained) && !about.hidden);
  if (about.hidden) return openImage(flat(white()), false);
  const image = await (await answered(`../v1/view/image?${option}&v=${encodeURIComponent(row.output_version)}`)).blob();
  openImage(flat(URL.createObjectURL(image)), false);
  if (!row.explained) return;
  const bitmap = await decode(image);
  const pixels = pixelsOf(bitmap);
  bitmap.close();
  // A method without a unit has no bias, and a limit of its own.
  const { limit, bias } = row.explained;
  const digits = bias === null ? 3 : 0;
  state.field = { pixels, strengths: strengthsOf(row.explained, limit, pixels.width, pixels.height) };
  element("map-name").textContent = "Evidence";
  [element("low").textContent, element("high").textContent] = [signed(-limit, digits), signed(limit, digits)];
  element("middle").textContent = bias === null ? "units of its method" : "log-odds per cell";
  setOpacity(100 * overlay.opacity);
}

async function begin() {
  state.about = await ask(`../v1/view?${options()}`);
  state.row = await ask(`../v1/view/input?${option}`);
  const { row, about } = state;
  element("banners").replaceChildren(...banners(about));
  element("stage").setAttribute("aria-label", row.kind === "slide" ? `The slide ${name}` : `The field ${name}`);
  show("work", true);
  await showPlace();
  if (!row.width_px || row.error) return showFault(row);
  await (row.kind === "slide" ? openSlide() : openField());
}

function showFault(row) {
  show("mapping", false);
  show("hint", false);
  note(`It was not scored: ${words(row.error ?? "unknown")}. ${row.error_message ? sentence(row.error_message) : ""}`);
  element("facts").replaceChildren(listOf([["patient", row.patient], ["not scored because", words(row.error ?? "unknown")]]));
}

async function showPlace() {
  const kind = state.row.kind === "slide" ? "slides" : "fields";
  state.place = await placeOf(name, kind);
  const { number, total } = state.place;
  element("place").textContent = number ? `${number.toLocaleString("en")} of ${total.toLocaleString("en")}` : plural(total, kind.slice(0, -1));
  element("previous").disabled = !number || number === 1;
  element("next").disabled = number === total;
}

async function step(by) {
  const next = await state.place?.neighbour(by);
  if (next) location.assign(pageOf(next));
}

// ---- wiring -----------------------------------------------------------------------------------------------------

function zoom(factor) {
  state.image?.viewport.zoomBy(factor);
  state.image?.viewport.applyConstraints();
}

function fit() {
  state.image?.viewport.goHome();
}

function move([across, down]) {
  const { viewport } = state.image;
  const bounds = viewport.getBounds();
  viewport.panBy(new OpenSeadragon.Point(across * STEP * bounds.width, down * STEP * bounds.height));
  viewport.applyConstraints();
}

const KEYS = {
  "+": () => zoom(FACTOR),
  "=": () => zoom(FACTOR),
  "-": () => zoom(1 / FACTOR),
  0: fit,
  o: toggle,
  n: () => step(1),
  p: () => step(-1),
  "/": () => location.assign(`${back()}#find`),
  "?": () => element("help").showModal(),
  Escape: () => state.map && pin(-1),
};

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || element("help").open) return;
  if (event.target.matches("input") && !["o", "n", "p", "?", "/"].includes(event.key)) return;
  if (event.target.id === "token") return;
  const action = MOVES[event.key] ? () => move(MOVES[event.key]) : KEYS[event.key];
  if (!action || (MOVES[event.key] && !state.image)) return;
  event.preventDefault();
  state.byKey = Boolean(MOVES[event.key]) || ["+", "=", "-"].includes(event.key);
  action();
}

function wire() {
  document.title = element("name").textContent = name;
  element("back").href = back();
  for (const [id, action] of Object.entries({ previous: () => step(-1), next: () => step(1), in: () => zoom(FACTOR), out: () => zoom(1 / FACTOR), fit, keys: KEYS["?"] })) {
    element(id).addEventListener("click", action);
  }
  element("opacity").addEventListener("input", fade);
  document.addEventListener("keydown", press);
  window.addEventListener("hashchange", () => state.image?.isOpen() && goToHash());
  element("stage").addEventListener("pointermove", (event) => {
    if (event.pointerType !== "mouse" || !state.map || !state.image.isOpen()) return;
    const box = element("stage").getBoundingClientRect();
    point(state.map.at(...placeAt(event.clientX - box.left, event.clientY - box.top)));
  });
  element("stage").addEventListener("pointerleave", () => state.map && point(-1));
}

/** OpenSeadragon adds a style sheet, which the content policy forbids, unless it finds one that it has marked. */
function keepStyles() {
  // Of another namespace: to the browser it is no style sheet.
  const mark = document.createElementNS("bcd", "style");
  mark.setAttribute("data-openseadragon-mobile-css", "true");
  document.head.append(mark);
}

if (name) {
  keepStyles();
  wire();
  // OpenSeadragon is a classic script, which is deferred as this module is.
  loaded(begin);
} else location.replace("../slides");
