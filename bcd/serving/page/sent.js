// Whole slides: sent to the service, followed while they are scored, shown with their heat maps.

import { ServiceError, answered, ask, token } from "./service.js";
import { brief, element, make, mebibytes, plural, sentence, show, wrap } from "./text.js";

const KEPT = "bcd-slides";
const LOOK_S = 2;
const SUFFIX = /\.(svs|ndpi|scn|bif|svslide|dcm)$/i;
const MAYBE = /\.tiff?$/i;
const ENDED = new Set(["done", "failed", "cancelled", "lost"]);
const NAMES = { sending: "sending", queued: "waiting", running: "being scored", done: "scored", failed: "not scored", cancelled: "cancelled", lost: "no longer known" };

// Of each: `name`, `state`, `share` sent or scored, `document` of the service once it has an id, its card, and
// once it is done the `url` of its map and its `page` in the viewer.
const slides = [];
let most = 0;

/** Whether the service scores slides and a file is one; a small TIFF may be a field. */
export const isSlide = (file, limits) =>
  Boolean(limits.max_slide_bytes) && (SUFFIX.test(file.name) || (MAYBE.test(file.name) && file.size > limits.max_body_bytes));

/** Follow the slides that this tab has sent before; called when the model is known. */
export function resumeSlides(limits) {
  most = limits.max_slide_bytes ?? 0;
  if (!most || slides.length) return;
  for (const { id, name } of JSON.parse(sessionStorage.getItem(KEPT) ?? "[]")) follow(added(name, { id, state: "queued" }));
}

/** Forget all slides of this tab; the service keeps them. */
export function forgetSlides() {
  slides.splice(0);
  keep();
  render();
}

/** Send a slide and follow it. */
export async function addSlide(file) {
  const slide = added(file.name, null);
  try {
    if (file.size > most) {
      throw new ServiceError("body_too_large", `${mebibytes(file.size)}; the service accepts slides of ${mebibytes(most)}`);
    }
    slide.document = await upload(slide, file);
  } catch (error) {
    return ended(slide, error);
  }
  keep();
  return follow(slide);
}

function added(name, document) {
  const slide = { name, document, state: document?.state ?? "sending", share: 0, url: null };
  slides.push(slide);
  slide.card = make("li", "", { class: "slide" });
  element("slides").append(slide.card);
  fill(slide);
  render();
  return slide;
}

/** Send the file; unlike fetch, this request says how much has gone. */
function upload(slide, file) {
  return new Promise((resolve, reject) => {
    const request = (slide.request = new XMLHttpRequest());
    request.open("POST", `v1/slides?name=${encodeURIComponent(file.name)}`);
    if (token.known()) request.setRequestHeader("Authorization", `Bearer ${token.known()}`);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.upload.addEventListener("progress", ({ loaded, total }) => {
      slide.share = loaded / total;
      fill(slide);
    });
    const failed = () => reject(new ServiceError("unreachable", "it has stopped, there is no network, or the file was moved"));
    request.addEventListener("error", failed);
    request.addEventListener("abort", () => reject(new ServiceError("stopped", "stopped before it was sent")));
    request.addEventListener("load", () => {
      const answer = parsed(request.responseText);
      if (request.status === 202 && answer) return resolve(answer);
      const { code, message } = answer?.error ?? {};
      return reject(new ServiceError(code ?? "internal", message ?? `it answered with HTTP status ${request.status}`));
    });
    request.send(file);
  });
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** Ask until the slide has ended. */
async function follow(slide) {
  const path = `v1/slides/${slide.document.id}`;
  while (slides.includes(slide)) {
    try {
      slide.document = await ask(path);
    } catch (error) {
      if (error.code === "no_slide") return void set(slide, "lost");
      if (!["unreachable", "overloaded", "timeout"].includes(error.code)) return ended(slide, error);
    }
    set(slide, slide.document.state);
    if (ENDED.has(slide.state)) return void (slide.state === "done" && showResult(slide));
    await new Promise((resolve) => setTimeout(resolve, 1000 * LOOK_S));
  }
}

function set(slide, state) {
  slide.state = state;
  slide.share = slide.document?.progress?.share ?? 0;
  fill(slide);
  render();
}

function ended(slide, error) {
  slide.document = { ...slide.document, error: { code: error.code ?? "internal", message: error.message } };
  set(slide, error.code === "stopped" ? "cancelled" : "failed");
}

/** The heat map, which an address alone would not show: it needs the token. And the page in the viewer. */
async function showResult(slide) {
  const path = slide.document.files?.["heatmap.png"];
  if (!path) return;
  const blob = await (await answered(path.slice(1))).blob();
  slide.url = URL.createObjectURL(blob);
  fill(slide);
  const option = `job=${slide.document.id}`;
  // Not every service has a viewer.
  if (!(await answered(`v1/view?${option}`).catch(() => null))) return;
  slide.page = `slides/${encodeURIComponent(slide.document.slide.slide)}?${option}`;
  fill(slide);
}

async function save(slide, name) {
  const blob = await (await answered(slide.document.files[name].slice(1))).blob();
  const url = URL.createObjectURL(blob);
  make("a", "", { href: url, download: `${slide.name}.${name}` }).click();
  // The browser has opened it by the next turn of the event loop.
  setTimeout(() => URL.revokeObjectURL(url));
}

/** Cancel a slide, or delete it with its results. */
async function remove(slide) {
  slide.request?.abort();
  if (slide.document?.id) {
    try {
      await answered(`v1/slides/${slide.document.id}`, { method: "DELETE" });
    } catch (error) {
      if (error.code !== "no_slide") return ended(slide, error);
    }
  }
  if (!ENDED.has(slide.state)) return;
  if (slide.url) URL.revokeObjectURL(slide.url);
  slide.card.remove();
  slides.splice(slides.indexOf(slide), 1);
  keep();
  render();
}

/** The ids, so that a page that is loaded again follows them. */
function keep() {
  const known = slides.filter(({ document }) => document?.id).map(({ name, document }) => ({ id: document.id, name }));
  if (known.length) sessionStorage.setItem(KEPT, JSON.stringify(known));
  else sessionStorage.removeItem(KEPT);
}

function render() {
  show("slide-results", slides.length > 0);
  const busy = slides.filter(({ state }) => !ENDED.has(state)).length;
  element("slide-totals").textContent = busy ? `${plural(slides.length, "slide")}, ${busy} pending` : plural(slides.length, "slide");
}

function fill(slide) {
  const { card, document, name, page, share, state, url } = slide;
  const running = !ENDED.has(state);
  const head = wrap("div", { class: "slide-head" }, make("h3", name), make("span", said(slide), { class: "quiet" }));
  const parts = [head];
  if (state === "sending" || state === "running") {
    parts.push(make("progress", "", { max: "1", value: String(share), "aria-label": `${name}: ${NAMES[state]}` }));
  }
  if (document?.error) parts.push(make("p", sentence(document.error.message), { class: "bad" }));
  if (url) parts.push(make("img", "", { src: url, alt: `${name} with the probability of each tile` }));
  if (document?.slide) parts.push(wrap("dl", { class: "numbers" }, ...facts(document.slide).flatMap(([term, value]) => [make("dt", term), make("dd", value)])));
  const buttons = wrap("div", { class: "buttons" });
  // A tab of its own, so that images on this page are not lost; it has the token only where this one is its opener.
  if (page) buttons.append(make("a", "Open in the viewer", { href: page, target: "_blank", rel: "opener", class: "button" }));
  if (document?.files?.["tiles.geojson.gz"]) buttons.append(button("Tiles for QuPath", () => save(slide, "tiles.geojson.gz")));
  buttons.append(button(running ? "Cancel" : "Delete", () => remove(slide)));
  // Progress that changes must not take the focus from its button.
  const focused = card.contains(window.document.activeElement);
  card.replaceChildren(...parts, buttons);
  if (focused) buttons.lastChild.focus({ preventScroll: true });
}

function button(text, action) {
  const made = make("button", text, { type: "button" });
  made.addEventListener("click", action);
  return made;
}

function said({ document, share, state }) {
  if (state === "queued") return document.before ? `waiting, ${document.before} before it` : "waiting";
  const percent = share ? `, ${Math.round(100 * share)} %` : "";
  return NAMES[state] + (state === "sending" || state === "running" ? percent : "");
}

function facts(slide) {
  const share = slide.malignant_tile_share;
  const known = [
    ["tiles called malignant", share == null ? "" : `${(100 * share).toFixed(1)} %`],
    ["tiles with tissue", slide.tiles.toLocaleString("en")],
    ["tiles that cannot be read", slide.error_tiles ? slide.error_tiles.toLocaleString("en") : ""],
    ["tiles unlike the training data", slide.warned_tiles ? slide.warned_tiles.toLocaleString("en") : ""],
    ["tissue", slide.tissue_area_mm2 == null ? "" : `${brief(slide.tissue_area_mm2)} mm²`],
    ["size", `${slide.width_px.toLocaleString("en")} × ${slide.height_px.toLocaleString("en")} px, ${brief(slide.mpp)} µm/px`],
  ];
  return known.filter(([, value]) => value);
}
