// Elements of the page. Text is inserted as text, never as markup.

export const $ = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function say(id, text, wrong = false) {
  $(id).textContent = text;
  $(id).classList.toggle("wrong", wrong);
}

export const percent = (p) =>
  p >= 0.1 ? `${(100 * p).toFixed(0)}%` : p >= 0.0001 ? `${Number((100 * p).toPrecision(2))}%` : `${p.toExponential(0)}`;

// What a readout predicts.
export const READOUTS = { next_token: "next token", masked_next_token: "masked token", masked_token: "masked token" };

// Show white space with visible characters.
export const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·");

// Alternatives with bars, each a token or a class; `own` is the actual one. With `choose` each is a button.
export function bars(alternatives, own, choose) {
  const most = Math.max(...alternatives.map((one) => one.probability), 1e-9);
  const list = make("ul", { class: "bars" });
  for (const one of alternatives) {
    const bar = make(
      choose ? "button" : "div",
      choose ? { class: "bar", type: "button" } : { class: "bar" },
      make("span", { class: "word" }, one.name ?? visible(one.token)),
      make("span", { class: "number" }, percent(one.probability)),
    );
    bar.style.setProperty("--share", one.probability / most);
    bar.classList.toggle("own", one.token === own);
    if (choose) bar.addEventListener("click", () => choose(one.token));
    list.append(make("li", {}, bar));
  }
  return list;
}

export function sendWithKeys(form, area, plainEnter = false) {
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.isComposing) return;
    if (event.ctrlKey || event.metaKey || (plainEnter && !event.shiftKey)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
}
