// A line chart as SVG, redrawn when there is new data.

import { make } from "./dom.js";

const [LEFT, RIGHT, TOP, BOTTOM] = [56, 20, 10, 28];
const MOST_POINTS = 1200;

function svg(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// Round numbers that divide a range into about `count` parts.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9; n++) found.push(n * step);
  return found;
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  return size && size < 1e-4 ? value.toExponential(1) : String(Number(value.toPrecision(4)));
}

function thinned(points) {
  const every = Math.ceil(points.length / MOST_POINTS);
  return points.filter((_, number) => number % every === 0 || number === points.length - 1);
}

// series: [{name, color (0 to 5), dashed, points: [[x, y], …]}]; the key shows the values at the pointer.
export function chart(title, series, { width, height, fromZero = false }) {
  const drawn = series.filter((one) => one.points.length);
  const key = make("ul", { class: "keys-of-chart" });
  const last = (one) => one.points[one.points.length - 1];
  const summary = drawn.map((one) => `${one.name} ${short(last(one)[1])}`).join(", ");
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}; last: ${summary}` });
  const figure = make("figure", {}, make("figcaption", {}, title), picture, key);
  if (!drawn.length) return figure;

  const xs = drawn.flatMap((one) => one.points.map(([x]) => x));
  const ys = drawn.flatMap((one) => one.points.map(([, y]) => y));
  const min = (values) => values.reduce((a, b) => Math.min(a, b));
  const max = (values) => values.reduce((a, b) => Math.max(a, b));
  const [x0, x1] = [Math.min(0, min(xs)), max(xs) || 1];
  const pad = (max(ys) - min(ys)) * 0.05 || Math.abs(max(ys)) * 0.05 || 1;
  const [y0, y1] = [fromZero ? 0 : min(ys) - pad, max(ys) + pad];
  const px = (x) => LEFT + ((x - x0) / (x1 - x0)) * (width - LEFT - RIGHT);
  const py = (y) => height - BOTTOM - ((y - y0) / (y1 - y0)) * (height - TOP - BOTTOM);

  for (const y of ticks(y0, y1, height / 40)) {
    picture.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: py(y), y2: py(y) }));
    picture.append(svg("text", { x: LEFT - 8, y: py(y) + 4, "text-anchor": "end" }, short(y)));
  }
  for (const x of ticks(x0, x1, width / 90)) {
    picture.append(svg("text", { x: px(x), y: height - 8, "text-anchor": "middle" }, short(x)));
  }
  const items = drawn.map((one) => {
    const dash = one.dashed ? " dashed" : "";
    const points = thinned(one.points).map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`);
    picture.append(svg("polyline", { class: `line s${one.color}${dash}`, points: points.join(" ") }));
    if (one.dashed || one.points.length === 1) {
      for (const [x, y] of thinned(one.points)) picture.append(svg("circle", { class: `s${one.color}`, cx: px(x), cy: py(y), r: 3.5 }));
    }
    return make("li", { class: `s${one.color}${dash}` });
  });
  key.append(...items);
  const cross = svg("line", { class: "cross", y1: TOP, y2: height - BOTTOM, visibility: "hidden" });
  picture.append(cross);
  const describe = (pick) =>
    drawn.forEach((one, number) => {
      const [x, y] = pick(one);
      items[number].textContent = `${one.name} ${short(y)} (step ${x.toLocaleString("en")})`;
    });
  describe(last);
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const at = x0 + ((((event.clientX - box.left) / box.width) * width - LEFT) / (width - LEFT - RIGHT)) * (x1 - x0);
    const nearest = (one) => one.points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    describe(nearest);
    const x = px(Math.max(x0, Math.min(at, x1)));
    for (const [name, value] of [["x1", x], ["x2", x], ["visibility", "visible"]]) cross.setAttribute(name, value);
  });
  picture.addEventListener("pointerleave", () => {
    cross.setAttribute("visibility", "hidden");
    describe(last);
  });
  return figure;
}
