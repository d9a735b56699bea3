// Write: continue a text, shown as it is generated.

import { events } from "./api.js";
import { $, make, say, sendWithKeys } from "./dom.js";
import { settings } from "./settings.js";

let stopping = null;
let whole = "";

export function startWrite(showProbabilities) {
  $("write-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!stopping) write($("prompt").value, $("prompt").value);
  });
  sendWithKeys($("write-form"), $("prompt"));
  $("write-stop").addEventListener("click", () => stopping?.abort());
  $("write-on").addEventListener("click", () => write(whole, $("prompt").value));
  $("write-look").addEventListener("click", () => showProbabilities(whole));
}

// Only the end of a long text fits: shorten it until the server accepts it.
async function* writtenAfter(text, signal) {
  const asked = { ...settings(), stream_options: { include_usage: true } };
  while (true) {
    try {
      yield* events("v1/completions", { ...asked, prompt: text }, signal);
      return;
    } catch (error) {
      if (error.code !== "context_length_exceeded" || text === $("prompt").value) throw error;
      text = text.slice(Math.ceil(text.length / 4));
    }
  }
}

async function write(text, given) {
  stopping = new AbortController();
  const paper = $("written");
  const fresh = document.createTextNode("");
  paper.replaceChildren(make("span", { class: "given" }, given), text.slice(given.length), fresh);
  paper.hidden = false;
  whole = text;
  busy(true);
  say("write-status", "");
  const began = performance.now();
  let first = 0;
  let usage = null;
  let reason = "";
  try {
    for await (const event of writtenAfter(text, stopping.signal)) {
      first ||= performance.now();
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        fresh.appendData(choice.text);
        whole += choice.text;
        reason = choice.finish_reason ?? reason;
      }
    }
    const seconds = (performance.now() - began) / 1000;
    const why = reason === "stop" ? "ended by the model or at the stop text" : "reached the maximum";
    const rate = Math.round(usage.completion_tokens / seconds);
    say("write-status", `${usage.completion_tokens} tokens, ${rate} per second; ${why}`);
  } catch (error) {
    if (error.name === "AbortError") say("write-status", "Stopped.");
    else say("write-status", error.message, true);
  } finally {
    stopping = null;
    busy(false);
  }
}

function busy(is) {
  $("written").classList.toggle("busy", is);
  $("write-go").disabled = is;
  $("write-stop").disabled = !is;
  $("write-on").disabled = $("write-look").disabled = is || !whole;
}
