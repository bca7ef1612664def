// Every token of a prompt and one of its completions; what a target token read shows as a tint on the others.

const CUE = 0.18;
const CHIPS = 8;
const ENDS = /[.!?\u3002\uff01\uff1f\n]/;

export default function (component) {
  const { data } = component;
  const place = placeOf(component, make);
  if (!place.changed) return;
  place.data = data;
  place.pinned = null;
  place.hovered = null;
  setLooks(place.root, data.looks);
  setScale(place.root, data.scale);
  place.rows = rowsOf(data.rows);
  index(place);
  build(place);
  group(place, "token");
  hear(place, newsOf(place));
  show(place);
  // What can be pointed at stands at the end.
  if (!place.pinned) place.text.scrollTop = place.text.scrollHeight;
}

function make() {
  const place = { rev: null, hovered: null, pinned: null, anchor: null, tinted: [] };
  place.hear = (news) => {
    hear(place, news);
    show(place);
  };
  return place;
}

// What Python says: how tokens are taken together, and all scores of the tokens that were pinned.
function hear(place, news) {
  if (!news || !place.data) return;
  if (news.grain !== place.grain) group(place, news.grain);
  if (!news.pin || news.of !== place.data.of) return;
  const bytes = bytesOf(news.pin.values);
  const values = new Float32Array(place.data.texts.length);
  for (let at = 0; at < bytes.byteLength; at += 1) values[at] = bytes.getInt8(at) / 127;
  if (place.pinned && (place.pinned.asked[0] !== news.pin.asked[0] || place.pinned.asked[1] !== news.pin.asked[1])) return;
  place.pinned = { start: news.pin.start, end: news.pin.end, asked: news.pin.asked, values, full: true };
}

function rowsOf(base64) {
  const view = bytesOf(base64);
  const rows = [];
  for (let at = 0; at < view.byteLength; ) {
    const row = {
      start: view.getUint16(at, true),
      end: view.getUint16(at + 2, true),
      token: view.getUint8(at + 4) === 1,
      largest: view.getFloat32(at + 5, true),
      left: view.getFloat32(at + 9, true),
      pairs: [],
    };
    const count = view.getUint8(at + 13);
    at += 14;
    for (let number = 0; number < count; number += 1, at += 3) row.pairs.push([view.getUint16(at, true), view.getInt8(at + 2) / 127]);
    rows.push(row);
  }
  return rows;
}

// For every token: the row of its own, or that of its step.
function index(place) {
  const own = new Array(place.data.texts.length).fill(null);
  for (const row of place.rows) {
    if (row.token) own[row.start] = row;
    else for (let at = row.start; at < row.end; at += 1) own[at] ??= row;
  }
  place.own = own;
}

function build(place) {
  const { data, root } = place;
  place.panel = element("div", "panel");
  place.status = element("div", "status");
  place.status.setAttribute("role", "status");
  place.chips = element("div", "chips");
  place.panel.append(place.status, place.chips);
  const tools = element("label", "tools", "Intensity");
  place.intensity = element("input");
  Object.assign(place.intensity, { type: "range", min: "0.3", max: "3", step: "0.1", value: place.strength ?? "1" });
  place.intensity.addEventListener("input", () => {
    place.strength = place.intensity.value;
    show(place);
  });
  tools.appendChild(place.intensity);
  place.panel.appendChild(tools);
  place.text = element("div", "tokens");
  place.text.tabIndex = 0;
  place.text.setAttribute("role", "group");
  place.text.setAttribute("aria-label", "Tokens. Left and right move through the target's tokens, Enter pins, Escape lets go.");
  place.spans = [];
  data.runs.forEach((run) => place.text.appendChild(block(place, run)));
  place.text.addEventListener("pointerover", (event) => onHover(place, tokenOf(event)));
  place.text.addEventListener("pointerleave", () => onHover(place, -1));
  place.text.addEventListener("pointerdown", (event) => onDown(place, event));
  place.text.addEventListener("pointerup", (event) => onUp(place, event));
  place.text.addEventListener("keydown", (event) => onKey(place, event));
  root.replaceChildren(place.panel, place.text);
}

function block(place, [start, end, kind, where, section]) {
  const { data } = place;
  const look = data.looks[kind];
  const node = element("div", `block ${section}`);
  paintKind(node, kind);
  const head = element("div", "head");
  head.append(element("span", "kind", `${look.cue} ${look.label}`), element("span", "where", where));
  const body = element("div", "body");
  for (let at = start; at < end; at += 1) {
    const text = data.texts[at];
    const token = element("span", "token", text === "" ? "\u00b7" : text.replaceAll("\n", "\u21b5\n"));
    if (text === "") token.classList.add("part");
    if (place.own[at]) token.classList.add("target");
    token.dataset.t = at;
    place.spans[at] = token;
    body.appendChild(token);
  }
  node.append(head, body);
  return node;
}

// Which tokens are taken together: `unit` of each token, and the bounds of each unit.
function group(place, grain) {
  const { texts, runs } = place.data;
  place.grain = grain;
  place.unit = new Int32Array(texts.length);
  place.bounds = [];
  for (const [start, end] of runs) {
    for (let at = start; at < end; at += 1) {
      const before = at > start ? texts[at - 1] : "";
      const apart =
        at === start ||
        grain === "token" ||
        (grain === "word" && (/^\s/.test(texts[at]) || /\s$/.test(before))) ||
        (grain === "sentence" && ENDS.test(before) && !ENDS.test(texts[at]));
      if (apart) place.bounds.push([at, at + 1]);
      else place.bounds[place.bounds.length - 1][1] = at + 1;
      place.unit[at] = place.bounds.length - 1;
    }
  }
}

function tokenOf(event) {
  const value = event.target?.dataset?.t;
  return value === undefined ? -1 : Number(value);
}

function onHover(place, at) {
  if (place.anchor !== null && at >= 0 && place.own[at]) place.reach = at;
  const next = at >= 0 && place.own[at] ? at : null;
  if (next === place.hovered) return;
  place.hovered = next;
  if (!place.pinned || place.anchor !== null) show(place);
}

function onDown(place, event) {
  const at = tokenOf(event);
  if (at < 0 || !place.own[at]) return;
  if (event.shiftKey && place.pinned) {
    pin(place, Math.min(place.pinned.asked[0], at), Math.max(place.pinned.asked[1], at + 1));
    event.preventDefault();
    return;
  }
  place.anchor = at;
  place.reach = at;
  event.preventDefault();
  place.text.focus({ preventScroll: true });
}

function onUp(place, event) {
  if (place.anchor === null) return;
  const at = tokenOf(event) >= 0 && place.own[tokenOf(event)] ? tokenOf(event) : place.reach;
  const [first, last] = [Math.min(place.anchor, at), Math.max(place.anchor, at)];
  place.anchor = null;
  pin(place, place.bounds[place.unit[first]][0], place.bounds[place.unit[last]][1]);
}

function pin(place, start, end) {
  if (place.pinned && place.pinned.asked[0] === start && place.pinned.asked[1] === end) {
    place.pinned = null;
    show(place);
    return;
  }
  place.pinned = { ...sum(place, start, end), asked: [start, end], full: false };
  show(place);
  place.send("pin", [start, end]);
}

function onKey(place, event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (step) {
    const from = place.hovered ?? place.pinned?.asked[0] ?? (step > 0 ? -1 : place.own.length);
    let unit = from < 0 || from >= place.unit.length ? from : place.unit[from];
    if (from >= place.unit.length) unit = place.bounds.length;
    do unit += step;
    while (unit >= 0 && unit < place.bounds.length && !place.own[place.bounds[unit][0]]);
    if (unit < 0 || unit >= place.bounds.length) return;
    place.hovered = place.bounds[unit][0];
    place.pinned = null;
    place.spans[place.hovered].scrollIntoView({ block: "nearest" });
    show(place);
  } else if (event.key === "Enter" && place.hovered !== null) pin(place, ...place.bounds[place.unit[place.hovered]]);
  else if (event.key === "Escape") {
    place.pinned = null;
    show(place);
  } else return;
  event.preventDefault();
}

// What is known here of the sources of some tokens: rows of single tokens added up, or the step's.
function sum(place, start, end) {
  const members = [...new Set(place.own.slice(start, end))].filter(Boolean);
  const single = members.filter((row) => row.token);
  const rows = single.length ? single : members;
  const values = new Float32Array(place.data.texts.length);
  let left = 0;
  let total = 0;
  for (const row of rows) {
    let size = 0;
    for (const [at, value] of row.pairs) {
      values[at] += value * row.largest;
      size += Math.abs(value) * row.largest;
    }
    const whole = row.left < 1 ? size / (1 - row.left) : size;
    left += whole - size;
    total += whole;
  }
  if (rows.length && !single.length) [start, end] = [Math.min(...rows.map((row) => row.start)), Math.max(...rows.map((row) => row.end))];
  for (let at = start; at < end; at += 1) values[at] = 0;
  const largest = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  if (largest) for (let at = 0; at < values.length; at += 1) values[at] /= largest;
  return { start, end, values, left: total ? left / total : 0, step: !single.length };
}

function show(place) {
  if (!place.spans) return;
  for (const at of place.tinted) {
    const span = place.spans[at];
    span.classList.remove("raises", "lowers", "cue", "reader");
    span.style.removeProperty("--w");
  }
  place.tinted = [];
  const shown = place.anchor !== null ? dragged(place) : place.pinned ?? hovered(place);
  if (!shown) {
    place.status.textContent = place.rows.length
      ? "Point at an underlined token to see what it read; click pins it, dragging takes several."
      : "Nothing is known of what the tokens of this call read.";
    place.chips.replaceChildren();
    return;
  }
  const units = taken(place, shown.values);
  const strength = Number(place.strength ?? 1);
  for (const [unit, value] of units) {
    for (let at = place.bounds[unit][0]; at < place.bounds[unit][1]; at += 1) tint(place, at, value, strength);
  }
  for (let at = shown.start; at < shown.end; at += 1) {
    place.spans[at].classList.add("reader");
    place.tinted.push(at);
  }
  describe(place, shown, units);
}

function tint(place, at, value, strength) {
  const weight = Math.min(1, Math.abs(value) * strength);
  if (weight < 0.02) return;
  const span = place.spans[at];
  span.classList.add(value < 0 ? "lowers" : "raises");
  if (weight >= CUE) span.classList.add("cue");
  span.style.setProperty("--w", weight.toFixed(3));
  place.tinted.push(at);
}

function hovered(place) {
  return place.hovered === null ? null : sum(place, ...place.bounds[place.unit[place.hovered]]);
}

function dragged(place) {
  const [first, last] = [Math.min(place.anchor, place.reach), Math.max(place.anchor, place.reach)];
  return sum(place, place.bounds[place.unit[first]][0], place.bounds[place.unit[last]][1]);
}

// Values by unit, the largest first, divided by the largest.
function taken(place, values) {
  const totals = new Map();
  for (let at = 0; at < values.length; at += 1) if (values[at]) totals.set(place.unit[at], (totals.get(place.unit[at]) ?? 0) + values[at]);
  const found = [...totals].sort((one, other) => Math.abs(other[1]) - Math.abs(one[1]));
  const largest = found.length ? Math.abs(found[0][1]) || 1 : 1;
  return found.map(([unit, value]) => [unit, value / largest]);
}

function words(place, start, end) {
  const text = place.data.texts.slice(start, Math.min(end, start + 24)).join("").trim();
  return text.length > 60 ? `${text.slice(0, 59)}\u2026` : text;
}

function describe(place, shown, units) {
  const { data } = place;
  const asked = shown.asked ?? [shown.start, shown.end];
  const about = shown.end - shown.start === 1 ? "token" : `${shown.end - shown.start} tokens`;
  const logprobs = data.logprobs.slice(Math.max(0, asked[0] - data.prompt), Math.max(0, asked[1] - data.prompt));
  const parts = [`${shown.full ? "Pinned" : "Shown"}: ${about} \u201c${words(place, shown.start, shown.end)}\u201d`];
  if (logprobs.length) parts.push(`log p ${number(logprobs.reduce((one, other) => one + other, 0), 2)}`);
  if (shown.step) parts.push("scores of the whole step");
  else if (!data.signed && shown.end - shown.start > 1) parts.push("mean over its tokens");
  if (shown.full) parts.push("all sources");
  else parts.push(`${percent(shown.left ?? 0)} in tokens not shown`);
  place.status.textContent = parts.join(" \u00b7 ");
  const total = units.reduce((all, [, value]) => all + Math.abs(value), 0) || 1;
  const chips = units.slice(0, CHIPS).map(([unit, value]) => {
    const chip = element("button", `chip ${value < 0 ? "lowers" : "raises"}`);
    chip.addEventListener("click", () => place.spans[place.bounds[unit][0]].scrollIntoView({ block: "center" }));
    const sign = data.signed ? (value < 0 ? "\u2212" : "+") : "";
    chip.append(element("b", "", `${sign}${percent(Math.abs(value) / total)}`), element("span", "", words(place, ...place.bounds[unit]) || "\u2423"));
    chip.append(element("span", "from", kindAt(place, place.bounds[unit][0])));
    return chip;
  });
  place.chips.replaceChildren(...chips);
}

function kindAt(place, at) {
  const run = place.data.runs.find(([start, end]) => start <= at && at < end);
  return run ? place.data.looks[run[2]].label : "";
}
