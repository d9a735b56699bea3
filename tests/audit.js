// What a reader of this page would stumble over, one sentence each; the body of a function.

const SMALLEST = 10; // pixels
const NAMES = "td, th, code, label, button, summary, h1, h2, h3";
const LONGEST_NAME = 24; // characters that must stay on one line
const problems = [];
const root = document.documentElement;

function check(fine, problem) {
  if (!fine && !problems.includes(problem)) problems.push(problem);
}

// ---- colors, as [red, green, blue, alpha] from 0 to 1 ----
const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
const colors = new Map();

function colorOf(text) {
  if (!colors.has(text)) {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = text;
    context.fillRect(0, 0, 1, 1);
    colors.set(text, [...context.getImageData(0, 0, 1, 1).data].map((value) => value / 255));
  }
  return colors.get(text);
}

const over = ([r, g, b, a], below) => [r, g, b].map((value, part) => a * value + (1 - a) * below[part]);

// What can be behind an element: one color, or with a gradient each of its colors.
const known = new Map();

function behind(element) {
  if (!element) return [[1, 1, 1]];
  if (!known.has(element)) {
    const style = getComputedStyle(element);
    const shades = style.backgroundImage.match(/(rgba?|color|oklab|oklch)\([^)]*\)/g) ?? [];
    const below = behind(element.parentElement).map((color) => over(colorOf(style.backgroundColor), color));
    known.set(element, shades.length ? below.flatMap((color) => shades.map((shade) => over(colorOf(shade), color))) : below);
  }
  return known.get(element);
}

function luminance(color) {
  const [r, g, b] = color.map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

// The contrast ratio of WCAG 2.
function contrast(one, other) {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}

function checkContrast(element, text, color, size, weight) {
  let opacity = 1;
  for (let each = element; each; each = each.parentElement) opacity *= Number(getComputedStyle(each).opacity);
  const [r, g, b, a] = colorOf(color);
  const least = Math.min(...behind(element).map((below) => contrast(over([r, g, b, a * opacity], below), below)));
  const needed = size >= 24 || (size >= 18.66 && weight >= 700) ? 3 : 4.5;
  check(least >= needed, `"${text}" has a contrast of ${least.toFixed(2)}, below ${needed}`);
}

// ---- the page ----
check(root.scrollWidth <= root.clientWidth, `the page is ${root.scrollWidth} px wide`);
check(root.lang, "the page does not say its language");
check(document.title, "the page has no title");
check(document.querySelectorAll("h1").length === 1, `the page has ${document.querySelectorAll("h1").length} h1`);

// ---- its texts ----
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  const element = node.parentElement;
  const text = node.data.trim().replace(/\s+/g, " ").slice(0, 60);
  if (!text || element.closest("script, style, noscript, option, :disabled") || !element.checkVisibility({ visibilityProperty: true })) continue;
  const style = getComputedStyle(element);
  const picture = element.closest("svg");
  const scale = picture ? Math.hypot(element.getScreenCTM().a, element.getScreenCTM().b) : 1;
  const size = parseFloat(style.fontSize) * scale;
  check(size >= SMALLEST, `"${text}" is ${size.toFixed(1)} px high`);
  checkContrast(element, text, picture ? style.fill : style.color, size, Number(style.fontWeight));
  if (picture) {
    const [inner, outer] = [element.getBoundingClientRect(), picture.getBoundingClientRect()];
    check(inner.left >= outer.left - 1 && inner.right <= outer.right + 1, `"${text}" is cut off at the side of its chart`);
    check(inner.top >= outer.top - 1 && inner.bottom <= outer.bottom + 1, `"${text}" is cut off above or below its chart`);
  } else if (element.closest(NAMES)) {
    const range = document.createRange();
    for (const { 0: word, index } of node.data.matchAll(/\S+/g)) {
      if (word.length > LONGEST_NAME) continue;
      for (const { 0: part, index: start } of word.matchAll(/[^-/–]+/g)) {
        range.setStart(node, index + start);
        range.setEnd(node, index + start + part.length);
        const lines = new Set([...range.getClientRects()].map((box) => Math.round(box.top)));
        check(lines.size < 2, `the name "${part}" is broken`);
      }
    }
  }
}
for (const field of document.querySelectorAll("input[placeholder], textarea[placeholder]")) {
  if (field.value || !field.checkVisibility()) continue;
  const style = getComputedStyle(field, "::placeholder");
  checkContrast(field, field.placeholder, style.color, parseFloat(style.fontSize), Number(style.fontWeight));
}

// ---- its labels ----
const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
for (const id of ids) check(ids.indexOf(id) === ids.lastIndexOf(id), `the id "${id}" occurs twice`);
for (const picture of document.querySelectorAll("svg, img")) {
  if (!picture.checkVisibility() || picture.closest("[aria-hidden=true]")) continue;
  const label = picture.alt ?? (picture.getAttribute("role") === "img" && picture.getAttribute("aria-label"));
  check(label, `a picture has no label: ${picture.outerHTML.slice(0, 80)}`);
}
for (const control of document.querySelectorAll("input, textarea, select, button, a, summary, [role=radiogroup], [role=listbox], [role=log]")) {
  const named = control.getAttribute("aria-label") || control.getAttribute("aria-labelledby");
  const own = control.matches("button, a, summary") && (control.textContent.trim() || control.title || control.querySelector("[alt]"));
  check(named || own || control.labels?.[0]?.textContent.trim(), `a control has no label: ${control.outerHTML.slice(0, 80)}`);
}
return problems;
