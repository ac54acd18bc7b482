// The table of all images: its columns, its order, and its CSV.

import { chip, element, make, probability, signed, wrap } from "./text.js";

const COLUMNS = [
  { key: "name", name: "image", of: (item) => item.name },
  { key: "class", name: "class", of: (item) => item.answer?.predicted_class },
  { key: "probability", name: "probability", of: (item) => item.answer?.probability_malignant, digits: true },
  { key: "log_odds", name: "log-odds", of: (item) => item.answer?.log_odds, digits: true },
  { key: "novelty", name: "novelty", of: (item) => item.answer?.novelty, digits: true },
  { key: "notes", name: "warnings and errors", of: (item) => notes(item) || null },
];
const PENDING = { waiting: "waiting", sending: "sending …", held: "needs the token" };
const AS_ADDED = { of: (item) => item.number };
const order = { column: AS_ADDED, rising: true };

const warnings = (item) => item.answer?.warnings.map((one) => one.message).join("; ");
const notes = (item) => (item.error ? `${item.error.title}: ${item.error.message}` : (warnings(item) ?? ""));

function compare(a, b) {
  return typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
}

/** The images in the table's order; those without a value are last in both directions. */
export function sorted(items) {
  const { of } = order.column;
  return [...items].sort((one, other) => {
    const [a, b] = [of(one) ?? null, of(other) ?? null];
    if (a === null || b === null) return (a === null) - (b === null) || one.number - other.number;
    return (order.rising ? 1 : -1) * compare(a, b) || one.number - other.number;
  });
}

/** Build the heads, each a button; `sort` is called when the order has changed. */
export function buildHeads(sort) {
  for (const column of COLUMNS) {
    const button = make("button", column.name, { type: "button" });
    column.head = wrap("th", { scope: "col", class: column.digits ? "digits" : "" }, button);
    button.addEventListener("click", () => {
      order.rising = order.column === column ? !order.rising : true;
      order.column = column;
      markOrder();
      sort();
    });
    element("heads").append(column.head);
  }
}

function markOrder() {
  for (const column of COLUMNS) {
    if (column === order.column) column.head.setAttribute("aria-sort", order.rising ? "ascending" : "descending");
    else column.head.removeAttribute("aria-sort");
  }
}

/** Sort the rows. */
export function arrange(items) {
  const focused = document.activeElement;
  element("rows").replaceChildren(...sorted(items).map((item) => item.row));
  // A moved row loses the focus.
  if (element("rows").contains(focused)) focused.focus({ preventScroll: true });
}

/** Append a row; `choose` is called when it is clicked. */
export function addRow(item, choose) {
  item.canvas = make("canvas", "", { "aria-hidden": "true", width: 3, height: 2 });
  item.button = make("button", item.name, { type: "button" });
  item.row = wrap("tr", {}, wrap("td", {}, wrap("div", { class: "name" }, item.canvas, item.button)));
  // The whole row is for the mouse, the button for the keyboard.
  item.row.addEventListener("click", () => choose(item));
  element("rows").append(item.row);
}

/** Update the row of an image. */
export function fillRow(item, chosen) {
  const { answer, error } = item;
  if (chosen) item.button.setAttribute("aria-current", "true");
  else item.button.removeAttribute("aria-current");
  item.row.className = chosen ? "chosen" : "";
  const call = answer ? chip(answer) : make("span", error ? "not scored" : PENDING[item.status], { class: "quiet" });
  const digits = [
    answer ? probability(answer.probability_malignant) : "",
    answer ? signed(answer.log_odds) : "",
    answer?.novelty?.toFixed(2) ?? "",
  ];
  // Keep the first cell: its button may have the focus.
  while (item.row.children.length > 1) item.row.lastChild.remove();
  item.row.append(
    wrap("td", {}, call),
    ...digits.map((text) => make("td", text, { class: "digits" })),
    make("td", notes(item), { class: error ? "notes bad" : "notes" }),
  );
}

const CSV = {
  name: (item) => item.name,
  predicted_class: (item) => item.answer?.predicted_class,
  probability_malignant: (item) => item.answer?.probability_malignant,
  log_odds: (item) => item.answer?.log_odds,
  threshold: (item) => item.answer?.threshold,
  novelty: (item) => item.answer?.novelty,
  novelty_cutoff: (item) => item.answer?.novelty_cutoff,
  width_px: (item) => item.answer?.width_px,
  height_px: (item) => item.answer?.height_px,
  warnings,
  error: (item) => item.error?.code,
  error_message: (item) => item.error?.message,
  model_id: (item) => item.answer?.model_id,
};

/** One field of RFC 4180; an apostrophe before text that a spreadsheet would run as a formula. */
function field(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** All images in the table's order, with numbers in full precision. */
export function csv(items) {
  const lines = [Object.keys(CSV), ...sorted(items).map((item) => Object.values(CSV).map((of) => of(item)))];
  return lines.map((line) => `${line.map(field).join(",")}\r\n`).join("");
}
