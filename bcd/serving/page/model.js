// The model: its card in words.

import { brief, element, make, mebibytes, plural, show, wrap, words } from "./text.js";

const SPLITS = {
  case: "no case is in two parts",
  patient: "no patient is in two parts",
  official: "a published fold",
  image: "patients are in several parts",
};
const SYNTHETIC =
  "It was trained on synthetic images: its output shows that the software works, and says nothing about tissue.";
const LEAKY =
  "Images of the same patient were in several parts of its split: the accuracy on its card is far too high, and it may perform much worse here.";

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

function split({ protocol, fold, published }) {
  if (published) return ["by its publisher", "what it has seen is not known here"];
  const name = protocol === "official" ? `official fold ${fold}` : `by ${words(protocol)}`;
  return [name, SPLITS[protocol] ?? ""];
}

/** Balanced accuracy or its substitute, with its interval and the images that it was measured on. */
function accuracy({ metrics, leaky, published }) {
  const rows = metrics.summary ?? [];
  const row = [rows.find(([name]) => name === "balanced accuracy"), rows.find(([name]) => name === "image recognition rate")].find(
    (one) => one && one[1] !== "–",
  );
  const [stated] = published?.stated ?? [];
  if (!row && stated) {
    return [`${stated[0]}, stated by the publisher`, stated[1], published.stated_on ? `not measured here, on ${published.stated_on}` : "not measured here"];
  }
  if (!row) return ["test part", "not measured", "this model has not been evaluated"];
  const [name, value, interval] = row;
  if (metrics.too_few_patients) {
    const headline = interval.includes("too few") ? interval : "too few patients";
    return [`${name}, test part`, headline, metrics.too_few_patients];
  }
  const seen = leaky || published ? "of patients that it may have seen" : "of unseen patients";
  const on = metrics.n_images ? `on ${plural(metrics.n_images, "image")} ${seen}` : "on its test part";
  return [published ? `${name}, measured` : `${name}, test part`, value, interval === "–" ? on : `95 % interval ${interval}, ${on}`];
}

/** Show facts, warnings and metrics of the model; `about` is the document of /v1/model. */
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
  const slides = limits.max_slide_bytes ? ` · whole slides up to ${mebibytes(limits.max_slide_bytes)}` : "";
  element("drop-limits").textContent = `PNG, JPEG or TIFF · one field of view each · up to ${most} per file${slides}`;
  showScale(about);
}

function showMeasures({ metrics, study }) {
  const rows = (metrics.summary ?? []).map(([name, value, interval]) =>
    wrap("tr", {}, make("th", name, { scope: "row" }), make("td", value), make("td", interval)),
  );
  const heads = [study ? "out of fold" : "test part", "value", "95 % interval"].map((name) => make("th", name, { scope: "col" }));
  element("measures").replaceChildren(wrap("tr", {}, ...heads), ...rows);
  show("measures", rows.length > 0);
}

function showDetails({ card, limits }) {
  const facts = {
    classes: card.classes.map(words).join(", "),
    "called malignant": `from a probability of ${brief(card.threshold)}`,
    architecture: (card.study?.kind === "ensemble" ? `${card.study.n_models} × ` : "") + card.architecture,
    "network's input": `${card.input_width_px} × ${card.input_height_px} px`,
    "usual field": `${card.field_width_px} × ${card.field_height_px} px`,
    split: split(card).filter(Boolean).join(": "),
    seed: card.seed === null ? "" : String(card.seed),
    "data fingerprint": card.data_fingerprint?.slice(0, 12),
    source: card.published?.source,
    "licence of the weights": card.published?.license,
    "to cite": card.published?.citation,
    commit: card.git_commit?.slice(0, 12),
    limits: `${mebibytes(limits.max_body_bytes)} and ${limits.max_pixels.toLocaleString("en")} pixels per image`,
  };
  const known = Object.entries(facts).filter(([, value]) => value);
  element("details").replaceChildren(...known.flatMap(([name, value]) => [make("dt", name), make("dd", value)]));
}

/** The legend: the classes at both ends of the scale. */
function showScale({ card, overlay }) {
  const two = card.classes.length === 2;
  const [against, towards] = two ? card.classes.map(words) : ["against", "for the predicted class"];
  element("against").textContent = against;
  element("towards").textContent = towards;
  // Without a closed form each image has its own limit.
  const closed = card.evidence !== "gradcam";
  element("low").textContent = closed ? `−${brief(overlay.limit)}` : "least";
  element("high").textContent = closed ? `+${brief(overlay.limit)}` : "most";
  element("unit").textContent = overlay.unit;
  const label = `Colours from blue for ${against} over none to vermilion for ${towards}`;
  element("scale").setAttribute("aria-label", label);
  const ends = two ? `Vermilion is evidence for ${towards}, blue for ${against}` : "Vermilion is evidence for the predicted class, blue against it";
  const scale = closed
    ? "All images share this scale; colours saturate beyond its ends. The mean over the map plus the bias is the log-odds."
    : "Each image has its own scale: the maps are Grad-CAM, which does not add up to the log-odds.";
  element("reading").textContent = `${ends}; uncoloured places are evidence for neither. ${scale}`;
  show("reading", true);
}
