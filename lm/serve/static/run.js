// Run: the served model, and the curves of its training as they grow.

import { get } from "./api.js";
import { chart } from "./chart.js";
import { $, READOUTS, make, say } from "./dom.js";

const SECONDS = 2;

let lines = [];
let position = { file: "", next: 0 };
let changed = 0;

export function startRun(run) {
  const rows = {
    model: run.description,
    "served step": run.step.toLocaleString("en"),
    [run.task ? "task" : "objective"]: run.task ?? run.objective,
    ...(run.reads === "images" ? rowsOfImages(run) : rowsOfText(run)),
  };
  const row = ([name, value]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, value));
  $("about").append(...Object.entries(rows).map(row));
  for (const [section, values] of Object.entries(run.sections)) {
    const title = make("th", { colspan: 2, scope: "rowgroup", class: "section" }, section);
    $("settings-of-run").append(make("tbody", {}, make("tr", {}, title), ...Object.entries(values).map(row)));
  }
  addEventListener("resize", () => lines.length && draw(run));
  poll(run);
}

const rowsOfText = (run) => ({
  predicts: run.readouts.map((readout) => READOUTS[readout]).join(", "),
  "context length": `${run.context_length.toLocaleString("en")} tokens`,
  vocabulary: `${run.vocabulary.toLocaleString("en")} tokens`,
  "concurrent texts": `${run.limits.concurrent}, and ${run.limits.waiting} waiting`,
});

const rowsOfImages = (run) => ({
  images: `${run.image_size} × ${run.image_size} pixels, ${run.channels === 1 ? "gray" : "RGB"}`,
  neighbors: run.neighbors.note,
  "largest image": `${run.limits.pixels / 1e6} megapixels, in a request of at most ${Math.round(run.limits.body_bytes / 1e6)} MB`,
});

async function poll(run) {
  if (!$("run").hidden && !document.hidden) {
    try {
      const answer = await get(`api/metrics?from=${position.next}&file=${encodeURIComponent(position.file)}`);
      if (answer.whole) lines = [];
      lines.push(...answer.lines);
      position = answer;
      if (answer.lines.length) changed = Date.now();
      if (answer.more) return poll(run);
      if (answer.lines.length || answer.whole) draw(run);
      describe(run);
    } catch (error) {
      say("run-status", error.message, true);
    }
  }
  setTimeout(poll, SECONDS * 1000, run);
}

function describe(run) {
  const step = lines.length ? lines[lines.length - 1].step : 0;
  if (!step) return say("run-status", "No step has been logged yet.");
  const of = `Step ${step.toLocaleString("en")} of ${run.settings.steps.toLocaleString("en")}`;
  const newer = step > run.step ? `; the served model is from step ${run.step.toLocaleString("en")}` : "";
  const still = step < run.settings.steps && Date.now() - changed < 60_000 ? ", updated every two seconds" : "";
  return say("run-status", `${of}${still}${newer}.`);
}

const series = (name, key, color) => ({ name, color, points: pointsOf(lines, (line) => line[key]) });

function pointsOf(some, value) {
  return some.map((line) => [line.step, value(line)]).filter(([, y]) => typeof y === "number");
}

function draw(run) {
  const width = $("curves").clientWidth;
  if (!width) return; // hidden: the next poll draws
  const small = { width: width > 700 ? (width - 32) / 2 : width, height: 220, fromZero: true };
  const [losses, others] = run.reads === "images" ? curvesOfImages() : curvesOfText();
  const shown = others.filter(([, one]) => one.points.length);
  $("curves").replaceChildren(chart(...losses, { width, height: 320 }), ...shown.map(([title, one]) => chart(title, [one], small)));
}

// The loss of an objective that compares views is in no nats per token.
const VIEWS = ["simclr", "moco", "byol", "dino"];
const isOfTokens = (key) => !VIEWS.includes(key.replace(/^loss_/, ""));

const nameOf = (readout) => READOUTS[readout] ?? readout.replaceAll("_", " ");

function curvesOfText() {
  const training = lines.filter((line) => typeof line.loss === "number");
  const kinds = [...new Set(training.flatMap((line) => Object.keys(line).filter((key) => key.startsWith("loss_"))))].sort();
  const losses = (kinds.length ? kinds.filter(isOfTokens) : ["loss"]).map((key) => series(`training, ${nameOf(key.replace(/^loss_?/, "") || "loss")}`, key, 0));
  const validated = lines.filter((line) => line.validation);
  const readouts = [...new Set(validated.flatMap((line) => Object.keys(line.validation)))].filter(isOfTokens).sort();
  const validations = readouts.map((readout) => ({
    name: `validation, ${nameOf(readout)}`,
    dashed: true,
    points: pointsOf(validated, (line) => line.validation[readout]?.nats_per_token),
  }));
  losses.forEach((one, number) => (one.color = number));
  validations.forEach((one) => {
    const same = losses.findIndex((other) => other.name.endsWith(`, ${one.name.split(", ")[1]}`));
    one.color = same >= 0 ? same : losses.length === 1 && validations.length === 1 ? 0 : 2;
  });
  return [
    ["Loss, nats per token", [...losses, ...validations]],
    [
      ...kinds.filter((key) => !isOfTokens(key)).map((key) => ["Loss of views", series(nameOf(key.replace(/^loss_/, "")), key, 3)]),
      ["Tokens per second", series("tokens per second", "tokens_per_second", 5)],
      ["Learning rate", series("learning rate", "learning_rate", 4)],
    ],
  ];
}

// A validation of pretraining has an objective's name, one of fine-tuning is called metrics.
const validationOf = (line) => line.metrics ?? Object.values(line.validation ?? {})[0];

function curvesOfImages() {
  const validated = lines.filter(validationOf);
  const measured = (name, key, color) => ({ name, color, points: pointsOf(validated, (line) => validationOf(line)[key]) });
  return [
    ["Loss", [series("training", "loss", 0), { ...measured("validation", "loss", 0), dashed: true }]],
    [
      ["k-NN accuracy", measured("k-NN accuracy", "knn_accuracy", 1)],
      ["Accuracy", measured("accuracy", "accuracy", 1)],
      ["Spread", measured("spread", "spread", 2)],
      ["Effective rank", measured("effective rank", "effective_rank", 3)],
      ["Images per second", series("images per second", "images_per_second", 5)],
      ["Learning rate", series("learning rate", "learning_rate", 4)],
    ],
  ];
}
