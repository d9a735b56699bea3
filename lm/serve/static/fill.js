// Fill: the most likely tokens for each mask.

import { post } from "./api.js";
import { $, bars, make, say, sendWithKeys } from "./dom.js";

const MASK = "[MASK]";

export function startFill() {
  $("fill-form").addEventListener("submit", (event) => {
    event.preventDefault();
    fill();
  });
  sendWithKeys($("fill-form"), $("gaps"));
  $("fill-insert").addEventListener("click", () => {
    const area = $("gaps");
    area.setRangeText(MASK, area.selectionStart, area.selectionEnd, "end");
    area.focus();
  });
}

async function fill() {
  $("fill-go").disabled = true;
  say("fill-status", "");
  try {
    const answer = await post("api/fill", { text: $("gaps").value, top: 8 });
    show(answer);
  } catch (error) {
    say("fill-status", error.message, true);
  } finally {
    $("fill-go").disabled = false;
  }
}

function show({ pieces, candidates }) {
  const paper = $("filled");
  const cards = [];
  paper.replaceChildren();
  for (const piece of pieces) {
    if (!piece.filled) {
      paper.append(piece.text);
      continue;
    }
    const mark = make("mark", {}, piece.text);
    paper.append(mark);
    const number = cards.length;
    const card = make("div", { class: "card" }, make("h3", {}, `Mask ${number + 1}`));
    const draw = (own) => {
      const choose = (token) => {
        mark.textContent = token;
        draw(token);
      };
      card.querySelector("ul")?.remove();
      card.append(bars(candidates[number], own, choose));
    };
    draw(piece.text);
    cards.push(card);
  }
  paper.hidden = $("fill-hint").hidden = false;
  $("candidates").replaceChildren(...cards);
}
