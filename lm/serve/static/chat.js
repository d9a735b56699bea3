// Chat: a conversation, of which the newest messages that fit in the context are sent.

import { events } from "./api.js";
import { $, make, say, sendWithKeys } from "./dom.js";
import { settings } from "./settings.js";

let messages = [];
let stopping = null;

export function startChat(run) {
  $("chat-hint").textContent = run.chat_template
    ? "Messages are formatted with the run's chat template."
    : "This model was trained on text, not on conversations. Messages are formatted as plain turns, “User: …” and “Assistant: …”.";
  $("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("say").value.trim();
    if (stopping || !text) return;
    $("say").value = "";
    answer(text);
  });
  sendWithKeys($("chat-form"), $("say"), true);
  $("chat-stop").addEventListener("click", () => stopping?.abort());
  $("chat-new").addEventListener("click", () => {
    stopping?.abort();
    messages = [];
    $("talk").replaceChildren();
    say("chat-status", "");
    $("say").focus();
  });
}

// Drop the oldest messages until the rest fits; the last is always sent.
async function* answered(conversation, signal) {
  for (let sent = conversation; ; sent = sent.slice(2)) {
    try {
      yield* events("v1/chat/completions", { ...settings(), messages: sent }, signal);
      return;
    } catch (error) {
      if (error.code !== "context_length_exceeded" || sent.length < 3) throw error;
    }
  }
}

async function answer(text) {
  const controller = (stopping = new AbortController());
  messages.push({ role: "user", content: text });
  const bubble = make("li", { class: "assistant busy" });
  $("talk").append(make("li", { class: "user" }, text), bubble);
  bubble.scrollIntoView({ block: "nearest" });
  $("chat-stop").disabled = false;
  $("chat-go").disabled = true;
  say("chat-status", "");
  const conversation = messages;
  let reply = "";
  let failed = false;
  try {
    for await (const event of answered(conversation, controller.signal)) {
      for (const choice of event.choices) {
        reply += choice.delta.content ?? "";
        bubble.textContent = reply.trimStart();
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") say("chat-status", error.message, true);
    failed = true;
  } finally {
    bubble.classList.remove("busy");
    if (reply.trim()) conversation.push({ role: "assistant", content: reply.trim() });
    else {
      conversation.pop();
      bubble.remove();
      if (!failed) say("chat-status", "The model ended its turn without any text.");
    }
    stopping = null;
    $("chat-stop").disabled = true;
    $("chat-go").disabled = false;
  }
}
