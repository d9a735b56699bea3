// Settings: the values of the sliders and fields, as fields of a request.

import { $ } from "./dom.js";

const SLIDERS = ["temperature", "top_p", "min_p", "repetition_penalty"];

export function startSettings(run) {
  for (const name of SLIDERS) {
    const show = () => ($(`${name}-value`).textContent = Number($(name).value).toFixed(2));
    $(name).addEventListener("input", show);
    show();
  }
  $("max_tokens").max = run.limits.new_tokens;
}

export function settings() {
  const wanted = Object.fromEntries(SLIDERS.map((name) => [name, Number($(name).value)]));
  wanted.max_tokens = Number($("max_tokens").value) || 1;
  if ($("stop").value) wanted.stop = $("stop").value;
  if ($("seed").value !== "") wanted.seed = Number($("seed").value);
  return wanted;
}
