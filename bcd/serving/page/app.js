// The page: sends images to the service and shows its answers.

import { showModel } from "./model.js";
import { decode, draw, drawLegend, laidOver, pixelsOf, pngOf, strengthsOf } from "./picture.js";
import { ServiceError, ask, token } from "./service.js";
import { addSlide, forgetSlides, isSlide, resumeSlides } from "./sent.js";
import { addRow, arrange, buildHeads, csv, fillRow, sorted } from "./table.js";
import { brief, chip, element, make, mebibytes, plural, probability, sentence, show, side, signed, words, wrap } from "./text.js";

const IN_FLIGHT = 4;
const THUMB_PX = 96;
// Files in a folder that is dropped; others, such as lists and thumbnails of the system, are no images.
const IMAGE = /\.(png|jpe?g|tiff?|svs|ndpi|scn|bif|svslide|dcm)$/i;
const MIRAX = /\.mrxs$/i;
const STEPS = { ArrowLeft: -1, ArrowRight: 1 };

// The `status` of an item is waiting, sending, held (until there is a valid token), done or failed; its `source` is the
// file, or the service's preview of it.
const state = { about: null, items: [], chosen: null, shown: null, loading: null, active: 0, abort: new AbortController() };

const opacity = () => element("opacity").valueAsNumber / 100;
const say = (text) => (element("status").textContent = text);

// ---- the queue ------------------------------------------------------------------------------------------------

function add(given) {
  const limits = state.about?.limits ?? {};
  given.filter((file) => isSlide(file, limits)).forEach(addSlide);
  const files = given.filter((file) => !isSlide(file, limits));
  if (!files.length) return;
  const first = state.items.length;
  // Files that are dropped before the model is known wait.
  const status = state.about ? "waiting" : "held";
  for (const file of files) {
    const number = state.items.length + 1;
    const item = { number, file, source: file, name: file.name, status, answer: null, error: null };
    state.items.push(item);
    addRow(item, (one) => choose(one, true));
    fill(item);
  }
  choose(state.items[first]);
  pump();
}

function pump() {
  const waiting = state.items.filter((item) => item.status === "waiting");
  while (state.active < IN_FLIGHT && waiting.length) {
    state.active++;
    send(waiting.shift(), state.abort.signal).finally(() => {
      state.active--;
      pump();
    });
  }
  renderProgress();
}

async function send(item, signal) {
  item.status = "sending";
  fill(item);
  try {
    item.answer = await predict(item, signal);
    item.status = "done";
  } catch (error) {
    if (error.code === "whole_slide" && state.about.limits.max_slide_bytes && !MIRAX.test(item.name)) return void makeSlide(item);
    fail(item, signal.aborted ? signal.reason : error);
  }
  // "Clear all" may have removed the item.
  if (!state.items.includes(item)) return;
  fill(item);
  if (state.chosen === item) renderViewer();
}

/** What looked like a field is a slide: send it as one. */
function makeSlide(item) {
  state.items.splice(state.items.indexOf(item), 1);
  arrange(state.items);
  if (state.chosen === item) choose(state.items[0] ?? null);
  addSlide(item.file);
}

function fail(item, error) {
  if (error.code === "unauthorized") {
    item.status = "held";
    // The first of several rejected requests opens the form and stops the others.
    if (element("access").hidden) {
      askForToken("The service no longer accepts the token.");
      stop(error);
    }
    return;
  }
  item.status = "failed";
  item.error = error instanceof ServiceError ? error : new ServiceError("internal", `${error}`);
}

async function predict(item, signal) {
  // It was dropped before the limits were known.
  if (isSlide(item.file, state.about.limits)) throw new ServiceError("whole_slide", "it is a whole slide");
  const most = state.about.limits.max_body_bytes;
  if (item.file.size > most) {
    const both = `${mebibytes(item.file.size)}; the service accepts ${mebibytes(most)}`;
    throw new ServiceError("body_too_large", `${both}. Score whole slides with jobs/score.py`);
  }
  if (MIRAX.test(item.name)) {
    // It contains a small image of the slide; the slide's pixels are in a folder beside it.
    throw new ServiceError("whole_slide", "a MIRAX slide is several files; score it with jobs/score.py");
  }
  // Read first: a folder or a missing file would look like a lost network.
  const body = await item.file.arrayBuffer().catch(() => {
    throw new ServiceError("unreadable", "it is a folder, or was moved or changed since it was chosen");
  });
  const path = (await makeThumb(item)) ? "v1/predict" : "v1/predict?preview=true";
  const headers = { "Content-Type": item.file.type || "application/octet-stream" };
  const { preview_png: preview, ...answer } = await ask(path, { method: "POST", body, headers, signal });
  if (preview) {
    item.source = pngOf(preview);
    await makeThumb(item);
  }
  return answer;
}

/** Make the thumbnail for the table; false where this browser cannot decode the file. */
async function makeThumb(item) {
  const bitmap = await decode(item.source);
  if (!bitmap) return false;
  item.thumb = pixelsOf(bitmap, THUMB_PX);
  bitmap.close();
  return true;
}

/** Stop the requests in flight and fail the waiting ones. */
function stop(reason) {
  state.abort.abort(reason);
  state.abort = new AbortController();
  for (const item of state.items.filter((one) => one.status === "waiting")) {
    fail(item, reason);
    fill(item);
  }
  renderProgress();
  renderViewer();
}

const canSendAgain = (item) => item.error && !item.error.lasting;

function sendAgain(which) {
  for (const item of state.items.filter(which)) {
    Object.assign(item, { status: "waiting", error: null });
    fill(item);
  }
  renderViewer();
  pump();
}

function clearAll() {
  state.abort.abort(new ServiceError("stopped", "cleared"));
  Object.assign(state, { items: [], chosen: null, shown: null, loading: null, abort: new AbortController() });
  arrange(state.items);
  renderViewer();
  renderProgress();
  say("All images are cleared.");
}

// ---- progress and the table -----------------------------------------------------------------------------------

function fill(item) {
  fillRow(item, item === state.chosen);
  drawThumb(item);
}

function renderProgress() {
  const n = state.items.length;
  const count = (...statuses) => state.items.filter((item) => statuses.includes(item.status)).length;
  const [busy, failed] = [count("waiting", "sending"), count("failed")];
  show("progress", busy > 0);
  show("results", n > 0);
  show("table-box", n > 1);
  document.body.classList.toggle("some", n > 0);
  element("bar").value = n ? (n - busy) / n : 0;
  element("count").textContent = `${n - busy} of ${n} done`;
  element("totals").textContent = totals(failed, busy + count("held"));
  element("csv").disabled = busy === n;
  const again = state.items.filter(canSendAgain).length;
  show("again", again > 0);
  element("again").textContent = `Send again (${again})`;
  if (n) say(`${n - busy} of ${n} done${failed ? `, ${failed} not scored` : ""}`);
  if (!busy) arrange(state.items);
}

function totals(failed, coming) {
  const answers = state.items.map((item) => item.answer).filter(Boolean);
  const malignant = answers.filter((answer) => side(answer) === "malignant").length;
  const parts = [plural(state.items.length, "image")];
  if (answers.length > 1) parts.push(`${malignant} called malignant`, `${answers.length - malignant} benign`);
  if (failed) parts.push(`${failed} not scored`);
  if (coming) parts.push(`${coming} pending`);
  return parts.join(" · ");
}

function drawThumb(item) {
  if (!item.thumb) return;
  if (!item.answer) return draw(item.canvas, item.thumb);
  const { width, height } = item.thumb;
  const { overlay } = state.about;
  const strengths = strengthsOf(item.answer.evidence, item.answer.evidence.limit, width, height);
  draw(item.canvas, laidOver(item.thumb, strengths, overlay, opacity()));
}

function download() {
  const url = URL.createObjectURL(new Blob([csv(state.items)], { type: "text/csv;charset=utf-8" }));
  make("a", "", { href: url, download: `bcd-${state.about.model_id}.csv` }).click();
  // The browser has opened it by the next turn of the event loop.
  setTimeout(() => URL.revokeObjectURL(url));
}

// ---- the chosen image -----------------------------------------------------------------------------------------

function choose(item, scroll = false) {
  const before = state.chosen;
  state.chosen = item;
  for (const one of new Set([before, item])) if (one) fill(one);
  renderViewer();
  if (scroll) element("viewer").scrollIntoView({ block: "nearest" });
}

function step(by) {
  const list = sorted(state.items);
  choose(list[(list.indexOf(state.chosen) + by + list.length) % list.length]);
}

function renderViewer() {
  const item = state.chosen;
  show("viewer", Boolean(item));
  if (!item) return;
  const list = sorted(state.items);
  element("shown").textContent = item.name;
  show("steps", list.length > 1);
  element("place").textContent = `${list.indexOf(item) + 1} of ${list.length}`;
  element("verdict").replaceChildren(...(item.answer ? verdict(item.answer) : noVerdict(item)));
  show("controls", Boolean(item.answer));
  drawChosen();
}

/** Decode and show an image; until then the canvas is hidden, so that no image has a wrong name. */
async function load(source) {
  if (state.loading === source) return;
  state.loading = source;
  const bitmap = await decode(source);
  if (state.loading === source) {
    state.loading = null;
    state.shown = { source, pixels: bitmap && pixelsOf(bitmap), strengths: null };
    drawChosen();
  }
  bitmap?.close();
}

function drawChosen() {
  const { chosen, shown } = state;
  if (!chosen) return;
  const ready = shown?.source === chosen.source;
  element("viewer").setAttribute("aria-busy", String(!ready));
  if (!ready) return void load(chosen.source);
  const pair = element("pair").checked && Boolean(chosen.answer);
  show("frames", Boolean(shown.pixels));
  show("plain-frame", pair);
  element("viewer").classList.toggle("pair", pair);
  if (!shown.pixels) return;
  draw(element("plain"), shown.pixels);
  draw(element("evidence"), withEvidence(shown, chosen.answer));
  element("evidence-caption").textContent = chosen.answer ? "the image with its evidence" : "the image";
  element("evidence").setAttribute("aria-label", chosen.answer ? spoken(chosen.answer) : "The image");
}

function withEvidence(shown, answer) {
  const { pixels } = shown;
  if (!answer) return pixels;
  const { overlay } = state.about;
  shown.strengths ??= strengthsOf(answer.evidence, answer.evidence.limit, pixels.width, pixels.height);
  return laidOver(pixels, shown.strengths, overlay, opacity());
}

const spoken = (answer) => `The image with its evidence, ${answer.evidence.explains}`;

function noVerdict(item) {
  if (!item.error) {
    return [make("p", item.status === "held" ? "Waiting for the access token." : "Waiting for the model …", { class: "quiet" })];
  }
  const inside = [make("h3", item.error.title), make("p", sentence(item.error.message))];
  return [wrap("div", { class: "failure" }, ...inside)];
}

function verdict(answer) {
  const number = make("span", probability(answer.probability_malignant), { class: `number ${side(answer)}` });
  return [
    wrap("p", { class: "call" }, make("span", "predicted class", { class: "label" }), chip(answer)),
    wrap("p", { class: "call" }, make("span", "the model's probability of malignancy", { class: "label" }), number),
    rail(answer),
    ...answer.warnings.map((one) => make("p", sentence(one.message), { class: "warning" })),
    wrap("dl", { class: "numbers" }, ...numbers(answer).flatMap(([name, value]) => [make("dt", name), make("dd", value)])),
  ];
}

function numbers(answer) {
  const classes = Object.entries(answer.probabilities);
  const { novelty, novelty_cutoff: cutoff } = answer;
  return [
    ["log-odds", signed(answer.log_odds)],
    ...(answer.evidence.bias === null ? [] : [["evidence bias", signed(answer.evidence.bias)]]),
    ...(novelty === null ? [] : [["novelty", `${novelty.toFixed(2)} (usual up to ${cutoff.toFixed(2)})`]]),
    ["size", `${answer.width_px} × ${answer.height_px} px`],
    // The probability of one of two classes gives the other; that of one of eight does not.
    ...(classes.length > 2 ? classes.map(([name, value]) => [words(name), probability(value)]) : []),
  ];
}

/** The probability as a bar from 0 to 1 with the decision threshold marked. */
function rail(answer) {
  const [bar, tick] = [make("i"), make("b")];
  const mark = make("span", `threshold ${brief(answer.threshold)}`);
  bar.style.width = `${100 * answer.probability_malignant}%`;
  tick.style.left = `${100 * answer.threshold}%`;
  // The label is wider than the tick and stays between the ends.
  mark.style.left = `${100 * Math.min(0.75, Math.max(0.25, answer.threshold))}%`;
  return wrap(
    "div",
    {},
    wrap("div", { class: `rail ${side(answer)}`, "aria-hidden": "true" }, bar, tick),
    wrap("div", { class: "rail-ends" }, make("span", "0"), mark, make("span", "1")),
  );
}

let frame = 0;

function slide() {
  element("opacity-text").textContent = `${element("opacity").value} %`;
  // A slider sends more events than a screen has frames.
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(() => {
    if (!state.about) return;
    drawLegend(element("scale"), state.about.overlay, opacity());
    drawChosen();
    state.items.forEach(drawThumb);
  });
}

// ---- access ---------------------------------------------------------------------------------------------------

function askForToken(why = "") {
  show("access", true);
  element("access-error").textContent = why;
  element("token").value = "";
  element("token").focus();
}

async function enter(event) {
  event.preventDefault();
  const given = element("token").value.trim();
  // A header accepts no other characters, and no token has them.
  if (!/^[\x21-\x7e]+$/.test(given)) return askForToken("This is not a token: it has characters that no token has.");
  token.keep(given);
  await connect();
}

function forget() {
  token.forget();
  clearAll();
  forgetSlides();
  state.about = null;
  show("forget", false);
  show("work", false);
  element("banners").replaceChildren();
  askForToken();
}

async function connect() {
  show("trouble", false);
  const first = !state.about;
  show("connecting", first);
  try {
    state.about = await ask("v1/model");
  } catch (error) {
    return refused(error);
  } finally {
    show("connecting", false);
  }
  const entered = !element("access").hidden;
  show("access", false);
  show("forget", Boolean(token.known()));
  show("work", true);
  showModel(state.about);
  resumeSlides(state.about.limits);
  if (first) element("opacity").value = 100 * state.about.overlay.opacity;
  slide();
  if (entered) element("files").focus();
  sendAgain((item) => item.status === "held");
}

function refused(error) {
  if (error.code === "unauthorized") {
    const tried = Boolean(token.known());
    token.forget();
    return askForToken(tried ? "The service does not accept this token. Please check it and try again." : "");
  }
  show("trouble", true);
  element("trouble-text").textContent = `${error.title ?? "Something failed"}: ${sentence(error.message)}`;
}

// ---- wiring ---------------------------------------------------------------------------------------------------

function takeDrops() {
  const mark = (on) => element("drop").classList.toggle("over", on);
  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    // On the whole page: a browser would leave the page for a file that misses the zone.
    event.preventDefault();
    mark(true);
  });
  document.addEventListener("dragleave", (event) => mark(event.relatedTarget !== null));
  document.addEventListener("drop", (event) => {
    mark(false);
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    filesOf(event.dataTransfer).then(add);
  });
  document.addEventListener("paste", (event) => add([...event.clipboardData.files]));
}

/** The files of a drop, and those of its folders that may be images. */
async function filesOf(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.() ?? null);
  if (!entries.some((entry) => entry?.isDirectory)) return [...transfer.files];
  return (await Promise.all(entries.map((entry) => within(entry)))).flat();
}

async function within(entry, inFolder = false) {
  if (entry?.isFile) {
    return !inFolder || IMAGE.test(entry.name) ? [await new Promise((resolve, reject) => entry.file(resolve, reject))] : [];
  }
  const reader = entry?.createReader();
  const found = [];
  // A reader gives a hundred entries at a time, and none at its end.
  for (let some = [1]; reader && some.length; ) {
    some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    for (const one of some) found.push(...(await within(one, true)));
  }
  return found;
}

function onClick(id, action) {
  element(id).addEventListener("click", () => action());
}

function wire() {
  buildHeads(() => {
    arrange(state.items);
    renderViewer();
  });
  takeDrops();
  element("files").addEventListener("change", ({ target }) => {
    add([...target.files]);
    // The same file may be chosen again.
    target.value = "";
  });
  onClick("stop", () => stop(new ServiceError("stopped", "stopped before there was an answer")));
  onClick("again", () => sendAgain(canSendAgain));
  onClick("clear", () => (clearAll(), element("files").focus()));
  onClick("csv", download);
  onClick("previous", () => step(-1));
  onClick("next", () => step(1));
  onClick("reconnect", connect);
  onClick("forget", forget);
  element("steps").addEventListener("keydown", ({ key }) => STEPS[key] && step(STEPS[key]));
  element("access").addEventListener("submit", enter);
  element("opacity").addEventListener("input", slide);
  element("pair").addEventListener("change", drawChosen);
}

wire();
connect();
