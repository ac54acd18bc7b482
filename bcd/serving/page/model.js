// Which model answers: what its card says, in words.

import { brief, element, make, mebibytes, plural, show, wrap, words } from "./text.js";

const SPLITS = {
  case: "no case is on two sides",
  patient: "no patient is on two sides",
  official: "a published fold",
  image: "patients are on both sides",
};
const SYNTHETIC =
  "It was trained on made-up pictures: what it says shows that the software works, and nothing about tissue.";
const LEAKY =
  "Pictures of the same patient stood on both sides of its split: the accuracy on its card is far too good, and it may do much worse here.";

function banner(name, text) {
  return wrap("p", { class: "banner" }, make("strong", name), ` ${text}`);
}

function fact(name, value, more) {
  return wrap("div", {}, make("dt", name), make("dd", value), make("dd", more, { class: "more" }));
}

function range(values, unit) {
  if (!values.length) return "";
  const [low, high] = [Math.min(...values), Math.max(...values)].map(brief);
  return low === high ? `${low} ${unit}` : `${low} to ${high} ${unit}`;
}

function split({ protocol, fold }) {
  const name = protocol === "official" ? `official fold ${fold}` : `by ${words(protocol)}`;
  return [name, SPLITS[protocol] ?? ""];
}

/** Balanced accuracy, or what there is instead, with its interval and what it was measured on. */
function accuracy({ metrics, leaky }) {
  const rows = metrics.summary ?? [];
  const row = [rows.find(([name]) => name === "balanced accuracy"), rows.find(([name]) => name === "image recognition rate")].find(
    (one) => one && one[1] !== "–",
  );
  if (!row) return ["test part", "not measured", "this model has not been evaluated"];
  const [name, value, interval] = row;
  if (metrics.too_few_patients) return [`${name}, test part`, "too few patients", metrics.too_few_patients];
  const seen = leaky ? "of patients that it may have seen" : "of patients never seen";
  const on = metrics.n_images ? `on ${plural(metrics.n_images, "picture")} ${seen}` : "on its test part";
  return [`${name}, test part`, value, interval === "–" ? on : `95 % interval ${interval}, ${on}`];
}

/** Facts, warnings and measures of the model; `about` is the document of /v1/model. */
export function showModel(about) {
  const { card, limits } = about;
  const marks = [card.synthetic && banner("Synthetic model.", SYNTHETIC), card.leaky && banner("Leaky model.", LEAKY)];
  element("banners").replaceChildren(...marks.filter(Boolean));
  const magnifications = card.magnifications.map((one) => `${one}X`).join(", ");
  const scale = range(card.mpp, "µm/px");
  element("facts").replaceChildren(
    fact("model", about.model_id, `bcd ${about.version}`),
    fact("trained on", magnifications || scale || "unknown magnification", magnifications ? scale : ""),
    fact("split", ...split(card)),
    fact(...accuracy(card)),
  );
  showMeasures(card);
  showDetails(about);
  const most = mebibytes(limits.max_body_bytes);
  element("drop-limits").textContent = `PNG, JPEG or TIFF · one field of view each · up to ${most} a file`;
  showScale(about);
}

function showMeasures({ metrics }) {
  const rows = (metrics.summary ?? []).map(([name, value, interval]) =>
    wrap("tr", {}, make("th", name, { scope: "row" }), make("td", value), make("td", interval)),
  );
  const heads = ["test part", "value", "95 % interval"].map((name) => make("th", name, { scope: "col" }));
  element("measures").replaceChildren(wrap("tr", {}, ...heads), ...rows);
  show("measures", rows.length > 0);
}

function showDetails({ card, limits }) {
  const facts = {
    classes: card.classes.map(words).join(", "),
    "called malignant": `from a probability of ${brief(card.threshold)} on`,
    architecture: card.architecture,
    "network's input": `${card.input_width_px} × ${card.input_height_px} px`,
    "usual field": `${card.field_width_px} × ${card.field_height_px} px`,
    split: split(card).filter(Boolean).join(": "),
    seed: String(card.seed),
    "data fingerprint": card.data_fingerprint.slice(0, 12),
    commit: card.git_commit?.slice(0, 12),
    limits: `${mebibytes(limits.max_body_bytes)} and ${limits.max_pixels.toLocaleString("en")} pixels a picture`,
  };
  const known = Object.entries(facts).filter(([, value]) => value);
  element("details").replaceChildren(...known.flatMap(([name, value]) => [make("dt", name), make("dd", value)]));
}

/** Words of the legend: what the two ends of the scale speak for. */
function showScale({ card, overlay }) {
  const two = card.classes.length === 2;
  const [against, towards] = two ? card.classes.map(words) : ["against", "for the predicted class"];
  element("against").textContent = against;
  element("towards").textContent = towards;
  element("low").textContent = `−${brief(overlay.limit)}`;
  element("high").textContent = `+${brief(overlay.limit)}`;
  element("unit").textContent = overlay.unit;
  const label = `Colours from blue for ${against} over none to vermilion for ${towards}`;
  element("scale").setAttribute("aria-label", label);
  const ends = two ? `Vermilion speaks for ${towards}, blue for ${against}` : "Vermilion speaks for the predicted class, blue against it";
  element("reading").textContent =
    `${ends}; where no colour lies the model saw nothing either way. All pictures share this scale; beyond its ends the colour is full. The mean over the map plus the bias is the log-odds.`;
  show("reading", true);
}
