// The page: one tab for each thing that the served model can do.

import { get } from "./api.js";
import { startChat } from "./chat.js";
import { $ } from "./dom.js";
import { startFill } from "./fill.js";
import { startImage } from "./image.js";
import { look, startProbabilities } from "./probabilities.js";
import { startRun } from "./run.js";
import { startSettings } from "./settings.js";
import { startWrite } from "./write.js";

const tabs = [...document.querySelectorAll("[role=tab]")];
const available = () => tabs.filter((tab) => !tab.hidden);

function open(tab, focus = false) {
  for (const each of tabs) {
    const is = each === tab;
    each.setAttribute("aria-selected", is);
    each.tabIndex = is ? 0 : -1;
    $(each.getAttribute("aria-controls")).hidden = !is;
  }
  const writes = ["tab-write", "tab-chat"].includes(tab.id);
  $("settings").hidden = !writes;
  document.querySelector("main").classList.toggle("with-settings", writes);
  history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
  if (focus) tab.focus();
}

for (const tab of tabs) tab.addEventListener("click", () => open(tab));
$("tabs").addEventListener("keydown", (event) => {
  const all = available();
  const now = all.indexOf(document.activeElement);
  const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: -1 }[event.key];
  if (to === undefined || now < 0) return;
  event.preventDefault();
  open(all.at(to % all.length), true);
});

function showProbabilities(text) {
  open($("tab-probabilities"));
  look(text);
}

function startText(run) {
  $("tab-write").hidden = $("tab-chat").hidden = !run.readouts.includes("next_token");
  $("tab-fill").hidden = run.readouts.every((readout) => readout === "next_token");
  const [first, second = first, third = first] = run.openings;
  if (first) {
    $("prompt").value = first.prompt;
    $("gaps").value = second.fill;
    $("text").value = third.text;
  }
  startSettings(run);
  startWrite(showProbabilities);
  startChat(run);
  startFill();
  startProbabilities(run);
}

try {
  const run = await get("api/run");
  document.title = `${run.name} · Kindling`;
  $("name").textContent = run.name;
  $("lead").textContent = run.description;
  const readsImages = run.reads === "images";
  $("tab-image").hidden = !readsImages;
  for (const name of ["write", "chat", "fill", "probabilities"]) $(`tab-${name}`).hidden = readsImages;
  if (readsImages) startImage(run);
  else startText(run);
  const wanted = available().find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash);
  open(wanted ?? available()[0]);
  startRun(run);
} catch (error) {
  $("lead").textContent = error.message;
}
