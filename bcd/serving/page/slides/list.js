// The list of slides and fields: what is asked of the server is in the address, so that going back returns to it.

import { ask } from "../service.js";
import { element, make, plural, probability, show, words, wrap } from "../text.js";
import { loaded } from "./access.js";
import { banners } from "./facts.js";
import { PAGE_ROWS, defaults, keep, options, pageOf, search } from "./order.js";

// Milliseconds without a key, after which a filter is applied.
const PAUSE_MS = 250;
const share = (part) => `${(100 * part).toFixed(1)} %`;
const COLUMNS = {
  slides: [
    { key: "name", name: "slide" },
    { key: "patient", name: "patient", more: "minor" },
    { key: "tiles", name: "tiles", show: (n) => n.toLocaleString("en"), more: "minor" },
    { key: "share", name: "called malignant", show: share },
    { key: "probability", name: "probability, 95 % quantile", show: probability },
    { key: "novelty", name: "tiles unlike the training", show: (n) => n.toLocaleString("en"), more: "minor" },
    { key: "error", name: "not scored because", show: words },
  ],
  fields: [
    { key: "name", name: "field" },
    { key: "patient", name: "patient", more: "minor" },
    { key: "probability", name: "probability", show: probability },
    { key: "predicted", name: "class", show: words, fixed: true },
    { key: "novelty", name: "novelty", show: (x) => x.toFixed(2) },
    { key: "error", name: "not scored because", show: words },
  ],
};
const TEXTS = new Set(["name", "patient", "error", "predicted"]);

let about = null;
let query = { ...defaults("slides"), ...Object.fromEntries(new URLSearchParams(location.search)) };
let [asked, waiting] = [0, 0];

const offset = () => Number(query.offset ?? 0);

function change(changes) {
  query = { ...query, offset: 0, ...changes };
  clearTimeout(waiting);
  waiting = setTimeout(() => loaded(list), changes.offset === undefined && "text" in changes ? PAUSE_MS : 0);
}

async function list() {
  const mine = ++asked;
  const found = await ask(`v1/view/inputs?${search(query)}`);
  if (mine !== asked) return; // a later question is on its way
  history.replaceState(null, "", `?${search(query)}`);
  keep(query, found);
  renderHeads();
  element("rows").replaceChildren(...found.rows.map(row));
  renderPlace(found);
  show("work", true);
}

function row(one) {
  const cells = COLUMNS[query.kind].map(({ key, show: text, more = "" }) => {
    if (key === "name") {
      const link = make("a", one.name, { href: `slides/${pageOf(one.name)}` });
      return wrap("td", { class: "name" }, link);
    }
    const value = one[key];
    const shown = value === null || value === undefined ? "" : (text ?? String)(value);
    const cell = make("td", shown, { class: `${TEXTS.has(key) ? "" : "digits"} ${more}` });
    if (key === "novelty" && one.warnings?.length) cell.append(make("span", " unlike the training data", { class: "warned" }));
    return cell;
  });
  return wrap("tr", {}, ...cells);
}

function renderHeads() {
  element("heads").replaceChildren(
    ...COLUMNS[query.kind].map(({ key, name, fixed, more = "" }) => {
      const attributes = { scope: "col", class: `${TEXTS.has(key) ? "" : "digits"} ${more}` };
      if (fixed) return make("th", name, attributes);
      const falling = query.descending === "true";
      if (query.sort === key) attributes["aria-sort"] = falling ? "descending" : "ascending";
      const button = make("button", name, { type: "button" });
      // Numbers: the highest first.
      const next = query.sort === key ? !falling : !TEXTS.has(key);
      button.addEventListener("click", () => change({ sort: key, descending: String(next) }));
      return wrap("th", attributes, button);
    }),
  );
}

function renderPlace({ total, rows }) {
  element("total").textContent = `${plural(total, query.kind === "slides" ? "slide" : "field")} found`;
  const last = offset() + rows.length;
  element("place").textContent = rows.length ? `${(offset() + 1).toLocaleString("en")} to ${last.toLocaleString("en")}` : "";
  element("before").disabled = offset() === 0;
  element("after").disabled = last >= total;
  for (const kind of ["slides", "fields"]) element(kind).setAttribute("aria-pressed", String(query.kind === kind));
  element("least-name").textContent = query.kind === "slides" ? "95 % quantile of the probability" : "Probability";
}

function turn(by) {
  const button = element(by > 0 ? "after" : "before");
  if (!button.disabled) change({ offset: Math.max(0, offset() + by * PAGE_ROWS) });
}

function showFilter() {
  for (const id of ["text", "least", "most", "error"]) element(id).value = query[id] ?? "";
  element("unlike").checked = query.unlike === "true";
}

function wire() {
  for (const kind of ["slides", "fields"]) {
    element(kind).addEventListener("click", () => {
      query = defaults(kind);
      showFilter();
      change({});
    });
  }
  for (const id of ["text", "least", "most", "error"]) {
    element(id).addEventListener("input", ({ target }) => target.validity.valid && change({ [id]: target.value, text: element("text").value }));
  }
  element("unlike").addEventListener("change", ({ target }) => change({ unlike: String(target.checked) }));
  element("filter").addEventListener("submit", (event) => event.preventDefault());
  element("before").addEventListener("click", () => turn(-1));
  element("after").addEventListener("click", () => turn(1));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
    if (event.key === "/") (event.preventDefault(), element("text").focus());
    if (event.key === "n") turn(1);
    if (event.key === "p") turn(-1);
  });
}

// The list puts its question in the address in place of it.
const finds = location.hash === "#find";

async function begin() {
  about ??= await ask(`v1/view?${options()}`);
  document.title = element("title").textContent = about.title;
  element("banners").replaceChildren(...banners(about));
  element("slides").textContent = plural(about.n_slides ?? 0, "slide");
  element("fields").textContent = plural(about.n_images ?? 0, "field");
  for (const code of Object.keys(about.errors ?? {})) {
    if (![...element("error").options].some((one) => one.value === code)) element("error").append(make("option", words(code), { value: code }));
  }
  const said = [...new URLSearchParams(location.search).keys()].filter((key) => key !== "job");
  if (!said.length && !about.n_slides) query = defaults("fields");
  showFilter();
  await list();
  if (finds) element("text").focus();
}

wire();
loaded(begin);
