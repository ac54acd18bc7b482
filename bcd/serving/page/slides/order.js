// Addresses: the output that a page shows, and the order of its list, which the page of a slide follows.

import { ask } from "../service.js";

export const PAGE_ROWS = 50;
// Within a service: the slide that was sent, whose output is shown.
const job = new URLSearchParams(location.search).get("job") ?? "";
const KEPT = `bcd-view-list${job}`;

/** Options of an address, with those that name the output. */
export const options = (given = {}) => new URLSearchParams({ ...given, ...(job && { job }) });

/** The last part of the address of an input's page. */
export const pageOf = (name) => `${encodeURIComponent(name)}${job && `?${options()}`}`;

/** The list as it is first shown: the most malignant first. */
export const defaults = (kind) => ({ kind, sort: "probability", descending: "true", offset: 0 });

/** A question as options of an address, without those that say nothing. */
export function search(query) {
  const said = Object.entries({ ...query, limit: PAGE_ROWS }).filter(([, value]) => value !== "" && value !== "false");
  return options(Object.fromEntries(said));
}

/** Remember a page of the list for the pages of its inputs. */
export function keep(query, { total, rows }) {
  sessionStorage.setItem(KEPT, JSON.stringify({ query, total, names: rows.map(({ name }) => name) }));
}

function kept() {
  return JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
}

async function turned(query) {
  const found = await ask(`../v1/view/inputs?${search(query)}`);
  keep(query, found);
  return kept();
}

/** Where an input is in the list: its number from 1, how many there are, and a function to a neighbour's name. */
export async function placeOf(name, kind) {
  let page = kept();
  if (!page?.names.includes(name)) page = await turned(defaults(kind));
  const at = page.names.indexOf(name);
  const first = Number(page.query.offset ?? 0);
  const number = at < 0 ? null : first + at + 1;
  const neighbour = async (by) => {
    if (number === null) return page.names[0];
    if (number + by < 1 || number + by > page.total) return null;
    if (page.names[at + by]) return page.names[at + by];
    const next = await turned({ ...page.query, offset: Math.max(0, first + by * PAGE_ROWS) });
    return by > 0 ? next.names[0] : next.names.at(-1);
  };
  return { number, total: page.total, neighbour };
}

/** The address of the list, as it was last shown. */
export function back() {
  const page = kept();
  return `../slides?${page ? search(page.query) : options()}`;
}
