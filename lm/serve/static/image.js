// Image: what the model makes of a picture: what it reads, where it attends, its class and its nearest neighbors.

import { post } from "./api.js";
import { $, bars, make, percent, say } from "./dom.js";

const NEIGHBORS = 12;
const CLASSES = 10;

let run = null;
let asking = null; // an AbortController
let shares = []; // of each head: rows of columns

export function startImage(about) {
  run = about;
  $("neighbors-note").textContent = run.neighbors.note;
  $("looked").classList.toggle("coarse", run.image_size <= 96);
  $("picture").addEventListener("change", () => readFile($("picture").files[0]));
  document.addEventListener("paste", (event) => {
    if (!$("image").hidden && event.clipboardData.files.length) readFile(event.clipboardData.files[0]);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
  document.addEventListener("dragleave", () => $("drop").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) readFile(file);
    else say("image-status", "That is not a file: save the image first.", true);
  });
  $("samples").append(...run.samples.map(sampleButton));
  $("samples").hidden = !run.samples.length;
  if (run.samples.length) look(run.samples[0].image, nameOf(run.samples[0]));
}

const png = (data) => `data:image/png;base64,${data}`;
const nameOf = ({ name, class: label }) => (label === null ? name : `${name} (${label})`);

function picture(data, description) {
  const image = make("img", { alt: description, title: description });
  image.src = png(data);
  return image;
}

function sampleButton(sample) {
  const button = make("button", { type: "button" }, picture(sample.image, `held-out image: ${nameOf(sample)}`));
  button.addEventListener("click", () => look(sample.image, nameOf(sample)));
  return button;
}

function readFile(file) {
  if (!file) return;
  const most = Math.floor((run.limits.body_bytes * 3) / 4) - 4096;
  if (file.size > most) {
    const size = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
    say("image-status", `${file.name} has ${size(file.size)}; the server takes at most ${size(most)}.`, true);
    return;
  }
  const reader = new FileReader();
  reader.addEventListener("load", () => look(reader.result.slice(reader.result.indexOf(",") + 1), file.name));
  reader.addEventListener("error", () => say("image-status", `${file.name} cannot be read.`, true));
  reader.readAsDataURL(file);
}

async function look(data, name) {
  asking?.abort();
  const mine = (asking = new AbortController());
  say("image-status", `Looking at ${name} …`);
  try {
    const found = await post("api/image", { image: data, neighbors: NEIGHBORS }, mine.signal);
    say("image-status", "");
    show(found, name);
  } catch (error) {
    if (error.name !== "AbortError") say("image-status", `${name}: ${error.message}`, true);
  }
}

function show(found, name) {
  $("looked").hidden = false;
  for (const id of ["seen", "attended"]) $(id).src = png(found.pixels);
  $("seen").alt = `${name}, as the model reads it`;
  $("seen-caption").textContent = `${name}, as the model reads it: ${run.image_size} × ${run.image_size} pixels`;
  showHeads(found.attention);
  showClasses(found.prediction);
  showNeighbors(found.neighbors);
}

function showHeads(attention) {
  const before = $("heads").querySelector("input:checked")?.value ?? "all";
  shares = attention;
  const option = (value, text) => {
    const input = make("input", { type: "radio", name: "head", value });
    input.checked = value === before;
    input.addEventListener("change", () => showAttention(value));
    return make("label", {}, input, ` ${text}`);
  };
  const heads = attention.map((_, number) => option(`${number}`, `head ${number + 1}`));
  $("heads").replaceChildren(option("all", "all heads"), ...heads);
  showAttention(before);
}

function showAttention(value) {
  const mean = (row, column) => shares.reduce((sum, head) => sum + head[row][column], 0) / shares.length;
  const chosen = value === "all" ? shares[0].map((line, row) => line.map((_, column) => mean(row, column))) : shares[value];
  const cells = chosen.flatMap((line, row) => line.map((share, column) => ({ share, row, column })));
  const most = cells.reduce((best, cell) => (cell.share > best.share ? cell : best));
  const place = ({ row, column }) => `row ${row + 1}, column ${column + 1}`;
  $("overlay").style.setProperty("--columns", chosen[0].length);
  $("overlay").replaceChildren(
    ...cells.map((cell) => {
      const patch = make("span", { title: `${place(cell)}: ${percent(cell.share)}` });
      patch.style.setProperty("--share", cell.share / most.share);
      return patch;
    }),
  );
  const who = value === "all" ? "all heads" : `head ${Number(value) + 1}`;
  const times = (most.share * cells.length).toFixed(1);
  $("attended").alt = `The image with the attention of ${who} over it`;
  $("attended-caption").textContent =
    `Attention of ${who}: most on ${place(most)}, ${percent(most.share)}, ${times} times an even share (1/${cells.length})`;
}

function showClasses(prediction) {
  $("classes-title").hidden = prediction === null;
  if (prediction === null) return $("classes").replaceChildren();
  const classes = Object.entries(prediction.probabilities).map(([name, probability]) => ({ name, token: name, probability }));
  classes.sort((one, other) => other.probability - one.probability);
  return $("classes").replaceChildren(bars(classes.slice(0, CLASSES), prediction.label));
}

// A name whose lines may break after an underscore.
const breakable = (name) => name.split(/(?<=_)/).flatMap((part, number) => (number ? [make("wbr"), part] : [part]));

function showNeighbors(neighbors) {
  const counts = new Map();
  for (const { class: label } of neighbors) if (label !== null) counts.set(label, (counts.get(label) ?? 0) + 1);
  const sorted = [...counts].sort(([, one], [, other]) => other - one);
  const classes = sorted.map(([label, count]) => `${count} × ${label}`).join(", ");
  $("neighbors-title").hidden = $("neighbors-classes").hidden = !neighbors.length;
  $("neighbors-classes").textContent = `By the cosine of the features, the nearest first${classes && `: ${classes}`}.`;
  $("neighbors").replaceChildren(
    ...neighbors.map((each) =>
      make(
        "li",
        {},
        picture(each.image, each.name),
        ...(each.class === null ? [] : [make("span", { class: "label" }, ...breakable(each.class))]),
        make("span", { class: "cosine" }, each.cosine.toFixed(3)),
      ),
    ),
  );
}
