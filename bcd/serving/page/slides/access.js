// The token, where the viewer asks for one, and what is said where it does not answer.

import { token } from "../service.js";
import { element, sentence, show } from "../text.js";

/** Authorization, for requests that others send. */
export const authorization = () => (token.known() ? { Authorization: `Bearer ${token.known()}` } : {});

/** Load the page; where that needs a token, ask for it and load again. */
export async function loaded(load) {
  const again = () => loaded(load);
  element("access").onsubmit = (event) => {
    event.preventDefault();
    token.keep(element("token").value.trim());
    again();
  };
  element("reconnect").onclick = again;
  show("trouble", false);
  try {
    await load();
    show("access", false);
  } catch (error) {
    refused(error);
  }
}

/** Show an error in place of the page. */
export function refused(error) {
  show("work", false);
  if (error.code !== "unauthorized") {
    show("trouble", true);
    element("trouble-text").textContent = sentence(error.message);
    if (!error.code) throw error;
    return;
  }
  element("access-error").textContent = token.known() ? "The viewer does not accept this token." : "";
  token.forget();
  show("access", true);
  element("token").value = "";
  element("token").focus();
}
