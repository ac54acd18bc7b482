// The HTTP API: the token, retries while the service is busy, and one class for all errors.

const ATTEMPTS = 6;
// Seconds to wait where a busy service names none, and the most that it may name.
const [PAUSE_S, LONGEST_PAUSE_S] = [1, 60];
const TOKEN = "bcd-token";
const BY_STATUS = { 401: "unauthorized", 408: "slow_upload", 413: "body_too_large", 503: "overloaded", 504: "timeout" };
const TITLES = {
  unsupported_format: "Not a readable image",
  whole_slide: "A whole slide",
  truncated: "Damaged or cut short",
  too_many_pixels: "Too many pixels",
  empty: "An empty file",
  body_too_large: "The file is too large",
  overloaded: "The service is too busy",
  timeout: "No answer in time",
  slow_upload: "The upload was too slow",
  unreachable: "The service cannot be reached",
  unreadable: "The file cannot be read",
  stopped: "Stopped",
};
// Errors of the file itself: a retry would not help.
const LASTING = new Set(["unsupported_format", "whole_slide", "truncated", "too_many_pixels", "empty", "body_too_large", "unreadable"]);

export class ServiceError extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }

  get title() {
    return TITLES[this.code] ?? "Not scored";
  }

  get lasting() {
    return LASTING.has(this.code);
  }
}

export const token = {
  known: () => sessionStorage.getItem(TOKEN),
  keep: (value) => sessionStorage.setItem(TOKEN, value),
  forget: () => sessionStorage.removeItem(TOKEN),
};

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}

async function reply(path, options) {
  const known = token.known();
  const headers = { ...options.headers, ...(known && { Authorization: `Bearer ${known}` }) };
  try {
    return await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
  } catch (error) {
    if (options.signal?.aborted) throw options.signal.reason;
    throw new ServiceError("unreachable", "it has stopped, or there is no network");
  }
}

/** The error in an answer; a proxy in between may answer without our JSON. */
async function failure(response) {
  const { code, message } = (await response.json().catch(() => null))?.error ?? {};
  if (typeof code === "string" && typeof message === "string") return new ServiceError(code, message);
  const why = `it answered with HTTP status ${response.status} and no explanation`;
  return new ServiceError(BY_STATUS[response.status] ?? "internal", why);
}

async function content(response, signal) {
  try {
    return await response.json();
  } catch {
    throw signal?.aborted ? signal.reason : new ServiceError("unreachable", "its answer ended early");
  }
}

/** An answer of the service; while it is busy, wait as long as it states and retry. */
export async function answered(path, options = {}) {
  for (let attempt = 1; ; attempt++) {
    const response = await reply(path, options);
    if (response.ok) return response;
    if (response.status !== 503 || attempt === ATTEMPTS) throw await failure(response);
    const stated = parseFloat(response.headers.get("Retry-After"));
    await pause(stated >= 0 ? Math.min(stated, LONGEST_PAUSE_S) : PAUSE_S, options.signal);
  }
}

/** JSON from the service. */
export const ask = async (path, options = {}) => content(await answered(path, options), options.signal);
