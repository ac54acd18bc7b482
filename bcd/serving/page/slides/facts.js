// Numbers and facts of slides, tiles and fields in words. Numbers are those of the table, to the digit.

import { make, sentence, words, wrap } from "../text.js";

const MARKS = {
  synthetic: ["Synthetic model.", "It was trained on synthetic images: its output shows that the software works, and says nothing about tissue."],
  leaky: ["Leaky model.", "Images of the same patient were in several parts of its split: the accuracy on its card is far too high."],
};

/** Warnings about the output as a whole. */
export function banners(about) {
  const marks = Object.entries(MARKS).filter(([key]) => about[key]);
  const shown = marks.map(([, text]) => text);
  if (about.hidden) shown.push(["No pixels.", sentence(about.hidden)]);
  return shown.map(([name, text]) => wrap("p", { class: "banner" }, make("strong", name), ` ${text}`));
}

/** The shortest text of a float32, which is that of the table: 0.1 and not 0.10000000149011612. */
export function shortest(value) {
  if (value === null || Number.isNaN(value)) return null;
  for (let digits = 1; digits < 9; digits++) {
    const text = Number(value.toPrecision(digits));
    if (Math.fround(text) === Math.fround(value)) return String(text);
  }
  return String(Number(value.toPrecision(9)));
}

/** A list of names and values; those that are unknown are left out. */
export function listOf(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return wrap("dl", { class: "numbers" }, ...known.flatMap(([name, value]) => [make("dt", name), make("dd", String(value), { "data-of": name })]));
}

const percent = (part) => (part === null || part === undefined ? null : `${(100 * part).toFixed(1)} %`);

/** Facts of a slide. */
export function ofSlide(row) {
  return [
    ["patient", row.patient],
    ["tiles", row.tiles?.toLocaleString("en")],
    ["called malignant", percent(row.malignant_tile_share)],
    ["unlike the training", row.warned_tiles ? row.warned_tiles.toLocaleString("en") : null],
    ["tiles in error", row.error_tiles ? row.error_tiles.toLocaleString("en") : null],
    ["tissue", row.tissue_area_mm2 === null ? null : `${row.tissue_area_mm2.toPrecision(3)} mm²`],
    ["size", row.width_px ? `${row.width_px.toLocaleString("en")} × ${row.height_px.toLocaleString("en")} px` : null],
    ["scale", row.mpp ? `${row.mpp.toPrecision(3)} µm/px` : null],
  ];
}

/** Numbers of a tile, or of a field. */
export function ofRow(row, cutoff) {
  return [
    ["probability", shortest(row.probability)],
    ["log-odds", row.log_odds === null || Number.isNaN(row.log_odds) ? null : String(row.log_odds)],
    ["novelty", shortest(row.novelty)],
    ["usual up to", cutoff === null ? null : shortest(cutoff)],
    ["class", row.predicted ? words(row.predicted) : null],
    ["not scored", row.error ? words(row.error) : null],
    ["x", row.x],
    ["y", row.y],
    ["id", row.id],
  ];
}
