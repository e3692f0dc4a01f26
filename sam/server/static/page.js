// The image is embedded once; after that only prompts travel. Every answer is a step that can be undone.
// Of a video, or of several pictures, film.js takes the place of these steps.

import { Film, framesOf } from "./film.js";
import { COLORS, decode, paint, show } from "./masks.js";

const element = (id) => document.getElementById(id);
const [photo, overlay, marks] = ["photo", "overlay", "marks"].map(element);
const EVERYTHING = { points_per_side: 16 }; // with the thresholds that suit the model

let image = null; // {name, blob, width, height, embedding}; of a film, the session stands for the embedding
let film = null;
let steps = []; // {points, labels, box, answer, chosen} or {answer, everything: true}
let pending = null; // the AbortController of the request under way
let drag = null; // {x0, y0, x, y, label} in pixels of the image
let cross = null; // [x, y], where the keyboard points

const current = () => steps.at(-1) ?? null;

function say(text, bad = false) {
  element("status").textContent = text;
  element("status").classList.toggle("bad", bad);
}

// Talking to the service --------------------------------------------------------------------------------------

async function request(path, body, signal) {
  const json = !(body instanceof FormData);
  const response = await fetch(path, {
    method: "POST",
    body: json ? JSON.stringify(body) : body,
    headers: json ? { "Content-Type": "application/json" } : {},
    signal,
  });
  const answer = await response.json();
  if (!response.ok) throw Object.assign(new Error(answer.error.message), { code: answer.error.code });
  return answer;
}

async function call(path, body) {
  pending?.abort(); // a newer question makes the older one moot
  const mine = (pending = new AbortController());
  element("busy").hidden = false;
  try {
    return await request(path, body, mine.signal);
  } finally {
    if (pending === mine) {
      pending = null;
      element("busy").hidden = true;
    }
  }
}

/** As `call`, but nothing is moot: frames and prompts of a film follow one another. */
async function callInTurn(path, body) {
  element("busy").hidden = false;
  try {
    return await request(path, body);
  } finally {
    element("busy").hidden = true;
  }
}

async function embed(target) {
  const form = new FormData();
  form.append("image", target.blob);
  target.embedding = (await call("v1/embed", form)).embedding;
}

/** Ask about the image; once more with a new embedding if the server has dropped the old one. */
async function ask(path, question) {
  try {
    return await call(path, { embedding: image.embedding, ...question });
  } catch (error) {
    if (error.code !== "unknown_embedding") throw error;
    await embed(image);
    delete question.prompts?.[0].mask_input; // it belonged to the old one
    return await call(path, { embedding: image.embedding, ...question });
  }
}

async function attempt(work) {
  try {
    await work();
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
  }
  refresh();
}

// What the visitor does ---------------------------------------------------------------------------------------

const load = (files) => {
  pending?.abort();
  film?.close();
  film = null;
  document.body.classList.remove("filming");
  const source = framesOf([...files]);
  return source ? loadFilm(source) : loadImage(files[0]);
};

const loadFilm = (source) => attempt(async () => {
  [image, steps, cross] = [null, [], null];
  say("Opening the video …");
  const opened = new Film(source, { photo, call: callInTurn, say, attempt, refresh });
  film = opened;
  try {
    const { width, height } = await opened.open();
    if (film !== opened) return;
    image = { name: film.name, width, height, embedding: film.session };
  } catch (error) {
    opened.close();
    film = null;
    throw error;
  }
  document.body.classList.add("filming");
  element("welcome").hidden = true;
  element("frame").hidden = false;
  refresh();
  say(film.describe());
  marks.classList.add("pointed");
  marks.focus({ preventScroll: true });
});

const loadImage = (file) => attempt(async () => {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" }).catch(() => {
    throw new Error("This file is not an image that the browser can show.");
  });
  const [width, height] = [bitmap.width, bitmap.height];
  image = { name: (file.name || "image").replace(/\.[^.]*$/, ""), blob: file, width, height, embedding: null };
  steps = [];
  cross = null;
  show(photo, bitmap);
  bitmap.close();
  element("welcome").hidden = true;
  element("frame").hidden = false;
  refresh();
  say("Embedding the image …");
  const started = performance.now();
  await embed(image);
  say(`${width} × ${height}, embedded in ${seconds(started)}. Click on something.`);
  marks.classList.add("pointed"); // the keyboard works from here, but who uses the mouse needs no ring
  marks.focus({ preventScroll: true });
});

const segment = (change) => attempt(async () => {
  if (!image?.embedding) return;
  const last = current()?.everything ? null : current();
  const question = { points: last?.points ?? [], labels: last?.labels ?? [], box: last?.box ?? null, ...change };
  const prompt = {};
  if (question.points.length) Object.assign(prompt, { points: question.points, labels: question.labels });
  if (question.box) prompt.box = question.box;
  if (last && !change.box) prompt.mask_input = { result: last.answer.result, prompt: 0, mask: last.chosen };
  const started = performance.now();
  const several = question.points.length === 1 && !question.box;
  const answer = await ask("v1/segment", { prompts: [prompt], multimask: several });
  steps.push({ ...question, answer, chosen: answer.prompts[0].best });
  say(`${describe()} · ${seconds(started)}`);
});

const everything = () => attempt(async () => {
  if (!image?.embedding) return;
  say("Looking for everything …");
  const started = performance.now();
  const answer = await ask("v1/automatic", { ...EVERYTHING });
  steps.push({ answer, everything: true });
  say(`${answer.masks.length} masks · ${seconds(started)}`);
});

function click(x, y, label) {
  if (film) return film.ask({ points: [[x, y]], labels: [label] });
  const last = current()?.everything ? null : current();
  segment({ points: [...(last?.points ?? []), [x, y]], labels: [...(last?.labels ?? []), label] });
}

function undo() {
  pending?.abort();
  steps.pop();
  say(current() ? describe() : "Click on something.");
  refresh();
}

function clear() {
  if (film) return film.forget();
  pending?.abort();
  steps = [];
  say("Click on something.");
  refresh();
}

function choose(index) {
  const step = current();
  if (!step || step.everything || index >= step.answer.prompts[0].masks.length) return;
  step.chosen = index;
  say(describe());
  refresh();
}

function describe() {
  const step = current();
  if (step.everything) return `${step.answer.masks.length} masks`;
  const { masks, object_score } = step.answer.prompts[0], mask = masks[step.chosen];
  const unseen = object_score <= 0 ? ", no object seen" : ""; // only SAM 2 says
  return `${mask.area.toLocaleString("en")} px, predicted IoU ${mask.predicted_iou.toFixed(2)}${unseen}`;
}

const seconds = (since) => `${((performance.now() - since) / 1000).toFixed(2)} s`;

// Masks -------------------------------------------------------------------------------------------------------

function shown() {
  if (film) return film.masks();
  const step = current();
  if (!step) return [];
  const masks = step.everything
    ? [...step.answer.masks].sort((a, b) => b.area - a.area) : [step.answer.prompts[0].masks[step.chosen]];
  return masks.map((mask, index) => ({ ...mask, color: COLORS[index % COLORS.length] }));
}

function drawMarks() {
  const ratio = window.devicePixelRatio || 1;
  const { width, height } = marks.getBoundingClientRect();
  [marks.width, marks.height] = [width * ratio, height * ratio];
  const context = marks.getContext("2d");
  context.scale(ratio, ratio);
  const place = (x, y) => [(x / image.width) * width, (y / image.height) * height];
  const line = (path, color, thickness) => {
    Object.assign(context, { strokeStyle: color, lineWidth: thickness });
    context.stroke(path);
  };
  const prompt = film ? film.prompt : current();
  const box = drag && moved(drag) ? boxOf(drag) : prompt?.box;
  if (box) {
    const [x0, y0] = place(box[0], box[1]), [x1, y1] = place(box[2], box[3]);
    const path = new Path2D();
    path.rect(x0, y0, x1 - x0, y1 - y0);
    line(path, "#000a", 4);
    line(path, "#fff", 2);
  }
  (prompt?.points ?? []).forEach(([x, y], index) => {
    const path = new Path2D();
    path.arc(...place(x, y), 7, 0, 2 * Math.PI);
    context.fillStyle = prompt.labels[index] ? "#00b25a" : "#e0312f";
    context.fill(path);
    line(path, "#fff", 2);
    const sign = new Path2D(), [cx, cy] = place(x, y);
    sign.moveTo(cx - 3.5, cy);
    sign.lineTo(cx + 3.5, cy);
    if (prompt.labels[index]) {
      sign.moveTo(cx, cy - 3.5);
      sign.lineTo(cx, cy + 3.5);
    }
    line(sign, "#fff", 2);
  });
  if (cross) {
    const [cx, cy] = place(...cross), path = new Path2D(`M${cx - 12} ${cy}h24M${cx} ${cy - 12}v24`);
    line(path, "#000a", 4);
    line(path, "#fff", 2);
  }
}

/** Fit the frame into the stage, and show what the state is. */
function refresh() {
  const step = current(), ready = Boolean(image?.embedding);
  element("mode").disabled = !ready;
  element("everything").disabled = !ready || Boolean(film);
  for (const id of ["undo", "clear", "png", "json"]) element(id).disabled = film ? id === "undo" || !film.masks().length : !step;
  if (film) refreshFilm();
  const masks = step && !step.everything ? step.answer.prompts[0].masks : [];
  element("choices").disabled = masks.length < 2;
  const scores = masks.length > 1 ? masks.map((mask) => mask.predicted_iou.toFixed(2)) : ["1", "2", "3"];
  element("choices").querySelector("div").replaceChildren(...scores.map((score, index) => {
    const [label, input, text] = ["label", "input", "span"].map((tag) => document.createElement(tag));
    Object.assign(input, { type: "radio", name: "choice", checked: masks.length > 1 && index === step.chosen });
    input.addEventListener("change", () => choose(index));
    text.textContent = score;
    label.title = `Mask ${index + 1} (${index + 1})`;
    label.append(input, text);
    return label;
  }));
  if (!image) return;
  const stage = element("stage");
  const scale = Math.min((stage.clientWidth - 16) / image.width, (stage.clientHeight - 16) / image.height);
  element("frame").style.width = `${image.width * scale}px`;
  element("frame").style.height = `${image.height * scale}px`;
  paint(overlay, image.width, image.height, shown());
  drawMarks();
}

function refreshFilm() {
  const { newest, shown, count, playing, tracking, ended, objects, object } = film;
  Object.assign(element("seek"), { max: Math.max(newest, 0), value: shown, disabled: newest < 1 });
  element("at").textContent = `${shown + 1} / ${count}`;
  Object.assign(element("play"), { disabled: newest < 1 || tracking, textContent: playing ? "Stop" : "Play" });
  Object.assign(element("track"), { disabled: ended, textContent: tracking ? "Pause" : "Track" });
  element("objects").disabled = tracking;
  element("objects").querySelector("div").replaceChildren(...Array.from({ length: objects + 1 }, (_, index) => {
    const [label, input, text] = ["label", "input", "span"].map((tag) => document.createElement(tag));
    Object.assign(input, { type: "radio", name: "object", checked: index + 1 === object });
    input.addEventListener("change", () => film.choose(index + 1));
    text.textContent = index < objects ? index + 1 : "+";
    label.title = index < objects ? `Object ${index + 1}` : "A new object (N)";
    text.style.borderBottomColor = `rgb(${COLORS[index % COLORS.length]})`;
    label.append(input, text);
    return label;
  }));
}

// Downloads ---------------------------------------------------------------------------------------------------

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

/** White on black at the image's size; every mask of "everything" in a colour of its own. */
async function savePng() {
  const canvas = new OffscreenCanvas(image.width, image.height);
  const picture = new ImageData(image.width, image.height);
  new Uint32Array(picture.data.buffer).fill(0xff000000);
  shown().forEach((mask) => {
    const color = film || current().everything ? mask.color : [255, 255, 255];
    decode(mask.segmentation).pixels.forEach((inside, p) => inside && picture.data.set(color, 4 * p));
  });
  canvas.getContext("2d").putImageData(picture, 0, 0);
  save(await canvas.convertToBlob({ type: "image/png" }), `${image.name}_mask.png`);
}

function saveJson() {
  if (film) return saveText(film.json());
  const { points, labels, box, chosen, answer } = current();
  saveText({ prompt: { points, labels, box }, chosen, ...answer });
}

function saveText(document) {
  save(new Blob([JSON.stringify(document, null, 2)], { type: "application/json" }), `${image.name}.json`);
}

// Events ------------------------------------------------------------------------------------------------------

const clamp = (value, most) => Math.min(Math.max(value, 0), most);

function position(event) {
  const { left, top, width, height } = marks.getBoundingClientRect();
  return [
    clamp(((event.clientX - left) / width) * image.width, image.width),
    clamp(((event.clientY - top) / height) * image.height, image.height),
  ];
}

const moved = ({ startX, startY, endX, endY }) => Math.hypot(endX - startX, endY - startY) > 6; // CSS pixels
const boxOf = ({ x0, y0, x, y }) => [Math.min(x0, x), Math.min(y0, y), Math.max(x0, x), Math.max(y0, y)];

marks.addEventListener("pointerdown", (event) => {
  if (!image?.embedding || event.button === 1) return;
  cross = null;
  const [x, y] = position(event);
  const removes = event.button === 2 || event.altKey || document.querySelector("[name=mode]:checked").value === "0";
  const [startX, startY] = [event.clientX, event.clientY];
  drag = { x0: x, y0: y, x, y, startX, startY, endX: startX, endY: startY, label: removes ? 0 : 1 };
  marks.setPointerCapture(event.pointerId);
});
marks.addEventListener("pointermove", (event) => {
  if (!drag) return;
  [drag.x, drag.y] = position(event);
  [drag.endX, drag.endY] = [event.clientX, event.clientY];
  drawMarks();
});
marks.addEventListener("pointerup", () => {
  if (!drag) return;
  const done = drag;
  drag = null;
  if (moved(done) && film) film.ask({ box: boxOf(done) });
  else if (moved(done)) segment({ points: [], labels: [], box: boxOf(done) });
  else click(done.x0, done.y0, done.label);
});
marks.addEventListener("pointercancel", () => {
  drag = null;
  drawMarks();
});
marks.addEventListener("blur", () => marks.classList.remove("pointed"));
marks.addEventListener("contextmenu", (event) => event.preventDefault());
marks.addEventListener("keydown", (event) => {
  marks.classList.remove("pointed");
  const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (arrow) {
    const by = Math.max(image.width, image.height) / (event.shiftKey ? 20 : 100);
    const [x, y] = cross ?? [image.width / 2, image.height / 2];
    cross = [clamp(x + by * arrow[0], image.width), clamp(y + by * arrow[1], image.height)];
    drawMarks();
  } else if (event.key === "Enter" && cross) {
    click(...cross, event.shiftKey || event.altKey ? 0 : 1);
  } else return;
  event.preventDefault();
});

const setMode = (value) => { document.querySelector(`[name=mode][value="${value}"]`).checked = true; };
const open = () => element("file").click();
const KEYS = {
  o: open, z: undo, Escape: clear, e: everything, p: savePng, j: saveJson, a: () => setMode(1), r: () => setMode(0),
  1: () => choose(0), 2: () => choose(1), 3: () => choose(2),
  t: () => film?.track(), " ": () => film?.play(), n: () => film?.choose(film.objects + 1),
};
const BUTTON_OF = { z: "undo", Escape: "clear", e: "everything", p: "png", j: "json", t: "track", " ": "play", n: "objects" };
document.addEventListener("keydown", (event) => {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (!KEYS[key] || event.altKey || ((event.ctrlKey || event.metaKey) && key !== "z")) return;
  if (BUTTON_OF[key] && element(BUTTON_OF[key]).disabled) return;
  if (key === " " && (!film || event.target.closest("button, input"))) return; // there it has a meaning of its own
  event.preventDefault();
  KEYS[key]();
});

const track = () => film?.track(), play = () => film?.play();
for (const [id, work] of Object.entries({ open, undo, clear, everything, png: savePng, json: saveJson, track, play })) {
  element(id).addEventListener("click", work);
}
element("file").addEventListener("change", ({ target }) => {
  if (target.files[0]) load([...target.files]);
  target.value = "";
});
element("seek").addEventListener("input", ({ target }) => {
  const frame = Number(target.value); // refresh() writes it
  film.stop();
  film.seek(frame);
});
window.addEventListener("pagehide", () => film?.close());
const stage = element("stage");
for (const name of ["dragover", "dragleave", "drop"]) {
  stage.addEventListener(name, (event) => {
    event.preventDefault();
    stage.classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files[0]) load([...event.dataTransfer.files]);
  });
}
document.addEventListener("paste", ({ clipboardData }) => {
  const file = [...clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) load([file]);
});
new ResizeObserver(refresh).observe(stage);
refresh();
