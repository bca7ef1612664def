// The steps of a run as a list, with arcs from what the chosen step read. Only rows in view are in the document.

const ROW = 34;
const SPARE = 6;
const GUTTER = 52;
const ARCS = 6;
const WAIT = 4000;
const PAUSE = 250;
const MARKS = ["truth", "logprob", "reads"];
let counter = 0;

export default function (component) {
  const place = placeOf(component, make);
  if (!place.changed) return;
  take(place, component.data);
  rebuild(place);
  hear(place, newsOf(place));
  reveal(place, place.active);
  draw(place);
}

function make() {
  counter += 1;
  const place = { prefix: `tracer-map-${counter}`, folded: new Map(), active: -1, hovered: null, query: "", rev: null };
  place.waiting = null;
  place.hits = null;
  place.hear = (news) => {
    const found = hearFound(place, news);
    if (hear(place, news)) reveal(place, place.active);
    else if (!found) return;
    draw(place);
  };
  return place;
}

// Rows whose whole text has the words that are looked for now.
function hearFound(place, news) {
  if (!news || !place.data || news.of !== place.data.text.length || !place.query || news.query !== place.query) return false;
  const known = String(news.hits);
  if (place.hits && place.known === known) return false;
  place.known = known;
  place.hits = new Set(news.hits);
  rebuild(place);
  return true;
}

// The row that is selected by now. While a click of ours is on its way, older news is not listened to.
function hear(place, news) {
  if (!news || !place.data || news.of !== place.data.text.length) return false;
  if (place.waiting) {
    if (place.waiting.row !== news.select && Date.now() < place.waiting.until) return false;
    place.waiting = null;
  }
  const changed = place.active !== news.select;
  place.active = news.select;
  return changed;
}

function take(place, data) {
  if (place.data?.run !== data.run) {
    place.folded.clear();
    place.query = "";
    place.hits = null;
    if (place.search) place.search.value = "";
  }
  place.data = data;
  place.reads = readsOf(data.reads);
  place.truth = data.truth.some((value) => value !== null);
  place.logprob = data.logprob.some((value) => value !== null);
  if (!place.tree) build(place);
  setLooks(place.root, data.looks);
  setScale(place.root, data.scale);
  place.root.classList.toggle("has-truth", place.truth);
  place.root.classList.toggle("has-logprob", place.logprob);
  place.root.classList.toggle("has-reads", place.reads.size > 0);
  data.groups.forEach((group) => {
    if (!place.folded.has(group.name)) place.folded.set(group.name, group.folded);
  });
}

// What each target read: its row -> pairs of row and value from -127 to 127.
function readsOf(base64) {
  const found = new Map();
  if (!base64) return found;
  const view = bytesOf(base64);
  for (let at = 0; at < view.byteLength; ) {
    const target = view.getUint32(at, true);
    const count = view.getUint8(at + 4);
    at += 5;
    const pairs = [];
    for (let number = 0; number < count; number += 1, at += 5) pairs.push([view.getUint32(at, true), view.getInt8(at + 4) / 127]);
    found.set(target, pairs);
  }
  return found;
}

function build(place) {
  const bar = element("div", "search");
  place.search = element("input");
  place.search.type = "search";
  place.search.placeholder = "Find in these steps  ( / )";
  place.search.setAttribute("aria-label", "Find in these steps");
  place.search.maxLength = 200;
  place.found = element("span", "found");
  place.found.setAttribute("role", "status");
  bar.append(place.search, place.found);
  place.head = element("div", "head row");
  place.head.setAttribute("aria-hidden", "true");
  place.tree = element("div", "tree");
  place.tree.tabIndex = 0;
  place.tree.setAttribute("role", "tree");
  place.tree.setAttribute("aria-label", "Steps");
  place.space = element("div", "space");
  place.arcs = svg("svg", { class: "arcs", "aria-hidden": "true", width: GUTTER });
  place.rows = element("div", "rows");
  place.rows.setAttribute("role", "presentation");
  place.space.append(place.arcs, place.rows);
  place.tree.appendChild(place.space);
  place.root.append(bar, place.head, place.tree);
  place.search.addEventListener("input", () => {
    find(place, place.search.value);
  });
  place.search.addEventListener("keydown", (event) => onSearchKey(place, event));
  place.tree.addEventListener("keydown", (event) => onKey(place, event));
  place.tree.addEventListener("click", (event) => onClick(place, event));
  place.tree.addEventListener("pointermove", (event) => onHover(place, event));
  place.tree.addEventListener("pointerleave", () => hover(place, null));
  place.tree.addEventListener("scroll", () => requestAnimationFrame(() => drawRows(place)), { passive: true });
  new ResizeObserver(() => drawRows(place)).observe(place.tree);
  // "/" from anywhere on the page, unless something is being written.
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || !place.root.isConnected) return;
    const writing = event.composedPath()[0];
    if (writing instanceof HTMLElement && (writing.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(writing.tagName))) return;
    event.preventDefault();
    place.search.focus();
  });
}

// What is shown, top to bottom: rows, and a header for each group. With a search, only rows that match.
function rebuild(place) {
  const { data, query } = place;
  const items = [];
  place.at = new Map();
  let group = -1;
  let matches = 0;
  data.text.forEach((text, row) => {
    const hit = !query || place.hits?.has(row) || `${text}\n${label(place, row)}`.toLowerCase().includes(query);
    matches += hit ? 1 : 0;
    const own = data.group[row];
    if (own !== group && own >= 0 && (!query || hit)) items.push({ group: own, row: -1 });
    if (!query || hit) group = own;
    const folded = own >= 0 && !query && place.folded.get(data.groups[own].name);
    if (hit && !folded) items.push({ group: own, row });
    place.at.set(row, hit ? items.length - 1 : -1);
  });
  place.items = items;
  const looking = query && data.shortened && !place.hits ? ", looking further…" : "";
  place.found.textContent = query ? `${matches} of ${data.text.length}${looking}` : "";
  place.space.style.height = `${items.length * ROW}px`;
  place.arcs.setAttribute("height", items.length * ROW);
  place.tree.style.maxHeight = `${Math.min(Math.max(items.length, 4), 19) * ROW + 2}px`;
  place.cursor = Math.max(0, Math.min(place.cursor ?? 0, items.length - 1));
  const shown = itemOf(place, place.active);
  if (shown >= 0) place.cursor = shown;
}

// In the lines at once; where they are shortened, the whole texts are looked through elsewhere.
function find(place, text) {
  const query = text.trim().replace(/\s+/g, " ").toLowerCase();
  if (query !== place.query) {
    place.query = query;
    place.hits = null;
    clearTimeout(place.typing);
    // What was looked for last is known already, and would not be told again.
    const known = hearFound(place, newsOf(place));
    if (query && place.data.shortened && !known) place.typing = setTimeout(() => place.send("find", query), PAUSE);
  }
  rebuild(place);
  if (!place.query) reveal(place, place.active);
  draw(place);
}

function itemOf(place, row) {
  const at = place.at.get(row);
  return at === undefined || place.items[at]?.row !== row ? -1 : at;
}

function unfold(place, row) {
  const group = place.data.group[row];
  if (group >= 0 && place.folded.get(place.data.groups[group].name)) {
    place.folded.set(place.data.groups[group].name, false);
    rebuild(place);
  }
  const item = itemOf(place, row);
  if (item >= 0) place.cursor = item;
}

function reveal(place, row) {
  unfold(place, row);
  const item = itemOf(place, row);
  if (item >= 0) scrollTo(place, item);
}

function scrollTo(place, item) {
  const { tree } = place;
  const height = tree.clientHeight || parseInt(tree.style.maxHeight, 10);
  if (item * ROW < tree.scrollTop) tree.scrollTop = item * ROW - ROW;
  else if ((item + 1) * ROW > tree.scrollTop + height) tree.scrollTop = (item + 2) * ROW - height;
}

// The step whose sources are shown: the hovered or chosen one, or the answer where that was not explained.
function target(place) {
  for (const row of [place.hovered, place.active]) if (row !== null && place.reads.has(row)) return row;
  return place.data.fallback;
}

function draw(place) {
  drawHead(place);
  drawRows(place);
}

function drawHead(place) {
  const { data } = place;
  const cells = [element("span", "gutter"), element("span", "number", "#"), element("span", "name", "kind"), element("span", "text", "text")];
  const reader = target(place);
  const titles = {
    truth: ["truth", "Probability that the model takes it for true, by the truth probe, with its 95% band"],
    logprob: ["log p", "Mean log-probability of its tokens, nats"],
    reads: [reader >= 0 ? `read by ${data.number[reader]}` : "", data.method],
  };
  for (const mark of MARKS) {
    const cell = element("span", mark, titles[mark][0]);
    cell.title = titles[mark][1];
    cells.push(cell);
  }
  place.head.replaceChildren(...cells);
}

function drawRows(place) {
  if (!place.items) return;
  const { tree, items } = place;
  const first = Math.max(0, Math.floor(tree.scrollTop / ROW) - SPARE);
  const count = Math.ceil((tree.clientHeight || 600) / ROW) + 2 * SPARE;
  const reader = target(place);
  const values = new Map(place.reads.get(reader) ?? []);
  const nodes = [];
  for (let at = first; at < Math.min(items.length, first + count); at += 1) nodes.push(drawItem(place, at, values, reader));
  place.rows.replaceChildren(...nodes);
  place.tree.setAttribute("aria-activedescendant", items.length ? `${place.prefix}-${place.cursor}` : "");
  drawArcs(place, reader);
}

function drawItem(place, at, values, reader) {
  const item = place.items[at];
  const node = item.row < 0 ? drawGroup(place, item.group, values) : drawStep(place, item.row, values, reader);
  node.id = `${place.prefix}-${at}`;
  node.style.top = `${at * ROW}px`;
  node.dataset.at = at;
  node.setAttribute("role", "treeitem");
  node.setAttribute("aria-setsize", place.items.length);
  node.setAttribute("aria-posinset", at + 1);
  node.classList.toggle("cursor", at === place.cursor);
  return node;
}

function label(place, row) {
  const { data } = place;
  return data.looks[data.kind[row]].label;
}

function drawStep(place, row, values, reader) {
  const { data } = place;
  const look = data.looks[data.kind[row]];
  const node = element("div", "row step");
  paintKind(node, data.kind[row]);
  node.classList.toggle("chosen", row === place.active);
  node.classList.toggle("reader", row === reader);
  node.classList.toggle("pruned", data.pruned.includes(row));
  node.setAttribute("aria-selected", String(row === place.active));
  node.setAttribute("aria-level", data.group[row] >= 0 ? 2 : 1);
  const text = element("span", "text", data.text[row]);
  text.style.paddingLeft = `${14 * data.depth[row]}px`;
  node.append(
    element("span", "gutter"),
    element("span", "stripe"),
    element("span", "number", data.number[row]),
    element("span", "name kind", `${look.cue} ${look.label}`),
    text,
    truthCell(data.truth[row]),
    element("span", "logprob", data.logprob[row] === null ? "" : number(data.logprob[row], 2)),
  );
  const reads = element("span", "reads");
  const value = values.get(row);
  if (row === reader) reads.append(element("span", "self", "reads"));
  else if (value !== undefined) reads.append(bar(value, data.signed));
  node.append(reads);
  node.setAttribute("aria-label", spoken(place, row, value, reader));
  return node;
}

function truthCell(truth) {
  const node = element("span", "truth");
  if (!truth) return node;
  const [value, low, high] = truth;
  const track = element("span", "track");
  const band = element("span", "band");
  band.style.left = `${low}%`;
  band.style.width = `${Math.max(2, high - low)}%`;
  const dot = element("span", "dot");
  dot.style.left = `${value}%`;
  track.append(band, dot);
  node.append(track, element("span", "", number(value / 100, 2)));
  return node;
}

function spoken(place, row, value, reader) {
  const { data } = place;
  const parts = [`${data.number[row] === "" ? "prompt" : `step ${data.number[row]}`}, ${label(place, row)}: ${data.text[row]}`];
  if (data.pruned.includes(row)) parts.push("pruned");
  if (data.truth[row]) parts.push(`truth ${data.truth[row][0]} percent`);
  if (data.logprob[row] !== null) parts.push(`mean log-probability ${data.logprob[row]}`);
  if (value !== undefined && reader >= 0) {
    const way = data.signed ? (value < 0 ? ", lowers it" : ", raises it") : "";
    parts.push(`read by step ${data.number[reader]}: ${Math.round(100 * Math.abs(value))} percent of the largest${way}`);
  }
  return parts.join("; ");
}

function drawGroup(place, group, values) {
  const own = place.data.groups[group];
  const folded = Boolean(place.folded.get(own.name)) && !place.query;
  const node = element("div", "row group");
  node.setAttribute("aria-expanded", String(!folded));
  node.setAttribute("aria-level", 1);
  const reads = element("span", "reads");
  if (folded) {
    let most = 0;
    for (const [row, value] of values) if (place.data.group[row] === group && Math.abs(value) > Math.abs(most)) most = value;
    if (most) reads.append(bar(most, place.data.signed));
  }
  node.append(element("span", "gutter"), element("span", "fold", folded ? "▸" : "▾"), element("span", "text", own.label), reads);
  node.setAttribute("aria-label", own.label);
  return node;
}

function drawArcs(place, reader) {
  const paths = [];
  const to = reader < 0 ? undefined : place.at.get(reader);
  if (to !== undefined && to >= 0) {
    const y = to * ROW + ROW / 2;
    const pairs = [...(place.reads.get(reader) ?? [])].sort((one, other) => Math.abs(other[1]) - Math.abs(one[1])).slice(0, ARCS);
    for (const [row, value] of pairs) {
      const from = place.at.get(row);
      if (from === undefined || from < 0 || from === to) continue;
      const start = from * ROW + ROW / 2;
      const reach = GUTTER - Math.min(GUTTER - 6, 12 + Math.abs(to - from) * 4);
      const kind = place.data.signed && value < 0 ? "arc lowers" : "arc raises";
      const width = 1 + 4 * Math.abs(value);
      paths.push(svg("path", { class: kind, "stroke-width": width, d: `M ${GUTTER - 2} ${start} C ${reach} ${start} ${reach} ${y} ${GUTTER - 2} ${y}` }));
      paths.push(svg("circle", { class: kind, cx: GUTTER - 3, cy: start, r: 3 }));
    }
    paths.push(svg("path", { class: "arrow", d: `M ${GUTTER - 9} ${y - 5} L ${GUTTER - 1} ${y} L ${GUTTER - 9} ${y + 5} Z` }));
  }
  place.arcs.replaceChildren(...paths);
}

function itemAt(event) {
  const node = event.composedPath().find((part) => part instanceof HTMLElement && part.dataset.at !== undefined);
  return node ? Number(node.dataset.at) : -1;
}

function onClick(place, event) {
  const at = itemAt(event);
  if (at >= 0) open(place, at);
}

function onHover(place, event) {
  const item = place.items[itemAt(event)];
  hover(place, item && item.row >= 0 && place.reads.has(item.row) ? item.row : null);
}

function hover(place, row) {
  if (place.hovered === row) return;
  place.hovered = row;
  draw(place);
}

function open(place, at) {
  const item = place.items[at];
  if (!item) return;
  place.cursor = at;
  if (item.row < 0) {
    const name = place.data.groups[item.group].name;
    place.folded.set(name, !place.folded.get(name));
    rebuild(place);
    place.cursor = Math.min(at, place.items.length - 1);
    draw(place);
    return;
  }
  place.active = item.row;
  place.hovered = null;
  place.waiting = { row: item.row, until: Date.now() + WAIT };
  draw(place);
  place.send("open", item.row);
}

function onSearchKey(place, event) {
  if (event.key === "Escape") {
    place.search.value = "";
    find(place, "");
    place.tree.focus();
  } else if (event.key === "ArrowDown" || event.key === "Enter") {
    event.preventDefault();
    place.cursor = Math.max(0, place.items.findIndex((item) => item.row >= 0));
    place.tree.focus();
    if (event.key === "Enter") open(place, place.cursor);
    else draw(place);
  }
  event.stopPropagation();
}

function onKey(place, event) {
  if (event.target !== place.tree || event.ctrlKey || event.metaKey || event.altKey) return;
  const page = Math.max(1, Math.floor(place.tree.clientHeight / ROW) - 1);
  const last = place.items.length - 1;
  const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -last, End: last };
  const item = place.items[place.cursor];
  if (event.key in moves) {
    place.cursor = Math.max(0, Math.min(last, place.cursor + moves[event.key]));
    const row = place.items[place.cursor].row;
    place.hovered = row >= 0 && place.reads.has(row) ? row : null;
    scrollTo(place, place.cursor);
    draw(place);
  } else if (event.key === "Enter" || event.key === " ") open(place, place.cursor);
  else if ((event.key === "ArrowRight" || event.key === "ArrowLeft") && item?.group >= 0) {
    const name = place.data.groups[item.group].name;
    if (Boolean(place.folded.get(name)) === (event.key === "ArrowRight")) {
      place.folded.set(name, event.key === "ArrowLeft");
      rebuild(place);
      place.cursor = Math.max(0, place.items.findIndex((other) => other.group === item.group && other.row < 0));
      draw(place);
    }
  } else return;
  event.preventDefault();
  event.stopPropagation();
}
