// Probabilities: a text, colored by how much each token surprises the model.

import { post } from "./api.js";
import { $, bars, make, percent, say, sendWithKeys, visible } from "./dom.js";

const NAMES = {
  next_token: "left context (next token)",
  masked_next_token: "both sides (masked)",
  masked_token: "both sides (masked)",
};
const MOST_SURPRISING = 10; // nats

let answer = null;
let chosen = 0;

export function startProbabilities(run) {
  for (const [number, readout] of run.readouts.entries()) {
    const radio = make("input", { type: "radio", name: "readout", value: readout });
    radio.checked = number === 0;
    radio.addEventListener("change", show);
    $("readouts").append(make("label", {}, radio, ` ${NAMES[readout]}`));
  }
  $("look-form").addEventListener("submit", (event) => {
    event.preventDefault();
    look();
  });
  sendWithKeys($("look-form"), $("text"));
  $("tokens").addEventListener("keydown", (event) => {
    const to = { ArrowLeft: chosen - 1, ArrowRight: chosen + 1, Home: 0, End: answer.tokens.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(to, answer.tokens.length - 1)), true);
  });
}

export async function look(text) {
  if (text !== undefined) $("text").value = text;
  $("look-go").disabled = true;
  say("look-status", "Computing …");
  try {
    answer = await post("api/probabilities", { text: $("text").value, top: 8 });
    chosen = 0;
    show();
  } catch (error) {
    say("look-status", error.message, true);
  } finally {
    $("look-go").disabled = false;
  }
}

const readout = () => document.querySelector("input[name=readout]:checked").value;

function show() {
  if (!answer) return;
  const found = answer.readouts[readout()];
  const spans = answer.tokens.map((token, number) => {
    const span = make("span", { class: "token", role: "option", tabindex: number === 0 ? 0 : -1 }, token.text || visible(token.name));
    span.classList.toggle("part", !token.text);
    const surprise = -Math.log(found[number].probability);
    span.style.setProperty("--surprise", Math.min(surprise / MOST_SURPRISING, 1));
    span.title = percent(found[number].probability);
    span.addEventListener("click", () => choose(number, true));
    span.addEventListener("mouseenter", () => choose(number, false));
    return span;
  });
  $("tokens").replaceChildren(...spans);
  $("tokens").hidden = $("legend").hidden = $("look-hint").hidden = spans.length === 0;
  $("token").replaceChildren();
  if (spans.length) choose(Math.min(chosen, spans.length - 1), false);
  const nats = found.reduce((sum, one) => sum - Math.log(one.probability), 0) / (found.length || 1);
  say("look-status", `${found.length} tokens, ${nats.toFixed(2)} nats per token (perplexity ${Math.exp(nats).toFixed(1)})`);
}

function choose(number, focus) {
  const spans = $("tokens").children;
  for (const span of spans) {
    span.setAttribute("aria-selected", "false");
    span.tabIndex = -1;
  }
  chosen = number;
  spans[number].setAttribute("aria-selected", "true");
  spans[number].tabIndex = 0;
  if (focus) spans[number].focus();
  const token = answer.tokens[number];
  const one = answer.readouts[readout()][number];
  $("token").replaceChildren(
    make(
      "div",
      { class: "card" },
      make("h3", {}, `“${visible(token.name)}”: ${percent(one.probability)}, rank ${one.rank.toLocaleString("en")} among all tokens`),
      bars(one.alternatives, token.name),
    ),
  );
}
