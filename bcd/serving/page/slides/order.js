// The order of the list, which the page of a slide follows to the next and the previous one.

import { ask } from "../service.js";

export const PAGE_ROWS = 50;
const KEPT = "bcd-view-list";

/** The list as it is first shown: the most malignant first. */
export const defaults = (kind) => ({ kind, sort: "probability", descending: "true", offset: 0 });

/** A question as options of an address, without those that say nothing. */
export function search(query) {
  const said = Object.entries({ ...query, limit: PAGE_ROWS }).filter(([, value]) => value !== "" && value !== "false");
  return new URLSearchParams(said);
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
  return page ? `../slides?${search(page.query)}` : "../slides";
}
