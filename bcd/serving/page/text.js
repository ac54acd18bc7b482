// Elements, texts and number formats.

const MINUS = "\u2212";

export const element = (id) => document.getElementById(id);

/** An element with text, never markup: file names and messages are untrusted. */
export function make(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** An element around others. */
export function wrap(tag, attributes, ...inside) {
  const made = make(tag, "", attributes);
  made.append(...inside);
  return made;
}

export function show(id, visible) {
  element(id).hidden = !visible;
}

export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1).replace(/\.?$/, ".");
export const plural = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
export const brief = (x) => String(Number(x.toPrecision(3))).replace("-", MINUS);
export const signed = (x, digits = 2) => (x < 0 ? MINUS : "+") + Math.abs(x).toFixed(digits);
export const probability = (p) => (p > 0.999 ? "> 0.999" : p < 0.001 ? "< 0.001" : p.toFixed(3));
export const mebibytes = (bytes) => `${brief(bytes / 2 ** 20)} MiB`;
export const words = (name) => name.replaceAll("_", " ");

/** The class at the threshold; subtypes have the colour of this class. */
export const side = (answer) => (answer.probability_malignant >= answer.threshold ? "malignant" : "benign");

export const chip = (answer) => make("span", words(answer.predicted_class), { class: `chip ${side(answer)}` });
