// The neighbourhood of a step: boxes and curves where Python put them, with zoom, pan and keys.
// Texts come from traces and are set as textContent only.

// A click waits this long for a second one, which opens the step instead of moving the graph under the pointer.
const DOUBLE_CLICK_MS = 260;
const LEAST_SCALE = 0.1;
const MOST_SCALE = 3;
const READABLE = 0.7;
const BOX = { width: 184, height: 48 };

export default function (component) {
  const place = placeOf(component, () => ({ view: null }));
  place.view ??= new View(place);
  if (place.changed) place.view.draw(component.data);
}

function drawn(name, attributes = {}, text = null) {
  const node = svg(name, attributes);
  if (text !== null) node.textContent = text;
  return node;
}

class View {
  constructor(place) {
    this.place = place;
    this.nodes = [];
    this.timer = null;
    this.at = { x: 0, y: 0, scale: 1 };
    this.root = element("div", "graph");
    this.canvas = drawn("svg", { class: "canvas", role: "group", "aria-label": "Graph of steps" });
    this.root.append(this.canvas, this.tools(), this.keys());
    place.root.append(this.root);
    this.canvas.addEventListener("pointerdown", (event) => this.drag(event));
    this.canvas.addEventListener("click", (event) => this.clicked(event));
    this.canvas.addEventListener("dblclick", (event) => this.opened(event));
    this.canvas.addEventListener("focusin", (event) => this.focused(event));
    this.root.addEventListener("keydown", (event) => this.pressed(event));
    this.canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
  }

  tools() {
    const tools = element("div", "tools");
    const actions = [
      ["+", "Zoom in", () => this.zoom(1.25)],
      ["−", "Zoom out", () => this.zoom(0.8)],
      ["Fit", "Fit the graph into the frame", () => this.fit(LEAST_SCALE)],
      ["1:1", "Natural size, around the selected step", () => this.around(1)],
    ];
    for (const [text, label, action] of actions) {
      const button = element("button", "", text);
      button.type = "button";
      button.setAttribute("aria-label", label);
      button.title = label;
      button.addEventListener("click", action);
      tools.append(button);
    }
    return tools;
  }

  keys() {
    const text = "Arrows move · Space selects · Enter or double click opens · P pins · + − 0 zoom · Shift with arrows pans";
    return element("p", "keys", text);
  }

  draw(data) {
    const focused = this.root.getRootNode().activeElement?.closest?.(".node");
    this.data = data;
    clearTimeout(this.timer);
    this.world = drawn("g");
    this.canvas.replaceChildren(this.world);
    const edges = drawn("g");
    this.edges = data.edges.map((edge) => this.edge(edge));
    edges.append(...this.edges);
    this.nodes = data.nodes.map((node, index) => this.node(node, index));
    this.world.append(edges, ...this.nodes);
    this.current = data.centre;
    this.emphasise(this.current);
    if (focused) this.nodes[this.current]?.focus({ preventScroll: true });
    // The frame has no size before the browser has laid it out.
    requestAnimationFrame(() => this.fit(READABLE));
  }

  node(node, index) {
    const classes = ["node", node.pruned ? "pruned" : "", index === this.data.centre ? "centre" : ""];
    const group = drawn("g", {
      class: classes.join(" ").trim(),
      transform: `translate(${node.x} ${node.y})`,
      role: "button",
      tabindex: index === this.data.centre ? 0 : -1,
      "aria-label": node.label,
      "aria-pressed": index === this.data.centre,
      "data-index": index,
    });
    group.style.color = node.colour;
    // A nested svg cuts off what is wider than the box.
    const inside = drawn("svg", { width: BOX.width, height: BOX.height });
    inside.append(
      drawn("text", { class: "title", x: 8, y: 18 }, node.title),
      drawn("text", { class: "text", x: 8, y: 37 }, node.text),
    );
    group.append(drawn("title", {}, node.label), drawn("rect", { width: BOX.width, height: BOX.height, rx: 6 }), inside);
    return group;
  }

  edge(edge) {
    const from = this.data.nodes[edge.source];
    const to = this.data.nodes[edge.target];
    const read = edge.weight !== null;
    const name = !read ? "structure" : edge.weight < 0 ? "lowers" : "raises";
    const group = drawn("g", { class: `edge ${name}`, "data-source": edge.source, "data-target": edge.target });
    if (read) group.style.color = this.data[name];
    const { path, middle, end, angle } = curve(from, to, read);
    const line = drawn("path", { class: "line", d: path });
    const head = drawn("path", {
      class: "head",
      d: "M -9 -4.5 L 0 0 L -9 4.5 z",
      transform: `translate(${end.x} ${end.y}) rotate(${angle})`,
    });
    if (read) {
      line.style.stroke = "currentColor";
      line.style.strokeWidth = 1 + 4 * edge.strength;
      line.style.opacity = 0.35 + 0.6 * edge.strength;
      if (edge.weight < 0) line.style.strokeDasharray = "7 4";
    }
    group.append(drawn("title", {}, edge.label), drawn("path", { class: "wide", d: path }), line, head);
    if (edge.shown) group.append(drawn("text", { x: middle.x, y: middle.y - 5 - (read ? 2 * edge.strength : 0) }, edge.shown));
    return group;
  }

  indexOf(target) {
    const group = target.closest?.(".node");
    return group ? Number(group.dataset.index) : null;
  }

  clicked(event) {
    const index = this.indexOf(event.target);
    if (index === null || event.detail > 1 || this.dragged) return;
    this.focus(index);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.select(index), DOUBLE_CLICK_MS);
  }

  opened(event) {
    const index = this.indexOf(event.target);
    clearTimeout(this.timer);
    if (index !== null) this.place.send("open", this.data.nodes[index].id);
  }

  select(index) {
    if (index !== this.data.centre) this.place.send("select", this.data.nodes[index].id);
  }

  focused(event) {
    const index = this.indexOf(event.target);
    if (index === null) return;
    this.current = index;
    this.emphasise(index);
  }

  focus(index) {
    this.nodes.forEach((node, other) => node.setAttribute("tabindex", other === index ? 0 : -1));
    this.nodes[index].focus({ preventScroll: true });
    this.reveal(index);
  }

  emphasise(index) {
    for (const edge of this.edges) {
      const own = Number(edge.dataset.source) === index || Number(edge.dataset.target) === index;
      edge.classList.toggle("faint", !own);
    }
  }

  pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const index = this.indexOf(event.target);
    if (step && event.shiftKey) this.pan(-60 * step[0], -60 * step[1]);
    else if (step) this.focus(this.nearest(this.current, ...step));
    else if (event.key === "+" || event.key === "=") this.zoom(1.25);
    else if (event.key === "-") this.zoom(0.8);
    else if (event.key === "0") this.fit(LEAST_SCALE);
    else if (event.key === "Enter" && index !== null) this.place.send("open", this.data.nodes[index].id);
    else if (event.key === " " && index !== null) this.select(index);
    else if (event.key.toLowerCase() === "p" && index !== null) this.place.send("pin", this.data.nodes[index].id);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  nearest(index, dx, dy) {
    const here = this.data.nodes[index];
    let best = index;
    let least = Infinity;
    this.data.nodes.forEach((node, other) => {
      const along = dx ? (node.x - here.x) * dx : (node.y - here.y) * dy;
      const aside = dx ? node.y - here.y : node.x - here.x;
      const far = along + 2 * Math.abs(aside);
      if (other !== index && along > 0 && far < least) [best, least] = [other, far];
    });
    return best;
  }

  size() {
    const { width, height } = this.canvas.getBoundingClientRect();
    return { width: width || 800, height: height || 620 };
  }

  move() {
    const { x, y, scale } = this.at;
    this.world.setAttribute("transform", `translate(${x} ${y}) scale(${scale})`);
  }

  pan(dx, dy) {
    this.at.x += dx;
    this.at.y += dy;
    this.move();
  }

  zoom(factor, point = null) {
    const { width, height } = this.size();
    const { x, y } = point ?? { x: width / 2, y: height / 2 };
    const scale = Math.min(MOST_SCALE, Math.max(LEAST_SCALE, this.at.scale * factor));
    const change = scale / this.at.scale;
    this.at = { x: x - change * (x - this.at.x), y: y - change * (y - this.at.y), scale };
    this.move();
  }

  fit(least) {
    if (!this.nodes.length) return;
    const box = this.world.getBBox();
    const { width, height } = this.size();
    const scale = Math.min(1.1, (width - 40) / box.width, (height - 90) / box.height);
    if (scale < least) return this.around(least);
    this.at = {
      x: (width - scale * box.width) / 2 - scale * box.x,
      y: (height - scale * box.height) / 2 - scale * box.y,
      scale,
    };
    this.move();
  }

  around(scale) {
    const { width, height } = this.size();
    const node = this.data.nodes[this.data.centre];
    this.at = {
      x: width / 2 - scale * (node.x + BOX.width / 2),
      y: height / 2 - scale * (node.y + BOX.height / 2),
      scale,
    };
    this.move();
  }

  reveal(index) {
    const { width, height } = this.size();
    const node = this.data.nodes[index];
    const left = this.at.x + this.at.scale * node.x;
    const top = this.at.y + this.at.scale * node.y;
    const right = left + this.at.scale * BOX.width;
    const bottom = top + this.at.scale * BOX.height;
    const dx = left < 20 ? 20 - left : right > width - 20 ? width - 20 - right : 0;
    const dy = top < 50 ? 50 - top : bottom > height - 40 ? height - 40 - bottom : 0;
    if (dx || dy) this.pan(dx, dy);
  }

  drag(event) {
    this.dragged = false;
    if (event.button !== 0) return;
    const start = { x: event.clientX, y: event.clientY, at: { ...this.at } };
    const moved = (next) => {
      const [dx, dy] = [next.clientX - start.x, next.clientY - start.y];
      if (!this.dragged && Math.hypot(dx, dy) < 5) return;
      this.dragged = true;
      this.canvas.classList.add("dragging");
      this.at = { ...start.at, x: start.at.x + dx, y: start.at.y + dy };
      this.move();
    };
    const done = () => {
      window.removeEventListener("pointermove", moved);
      window.removeEventListener("pointerup", done);
      window.removeEventListener("pointercancel", done);
      this.canvas.classList.remove("dragging");
    };
    window.addEventListener("pointermove", moved);
    window.addEventListener("pointerup", done);
    window.addEventListener("pointercancel", done);
  }

  wheel(event) {
    // Without a key the wheel scrolls the page, as everywhere else.
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const frame = this.canvas.getBoundingClientRect();
    this.zoom(Math.exp(-event.deltaY / 300), { x: event.clientX - frame.left, y: event.clientY - frame.top });
  }
}

// From the right of one box to the left of the other; what skips columns bulges, influence above and structure below,
// so that it does not seem to go through the boxes between.
function curve(from, to, read) {
  const onwards = from.x <= to.x;
  const lift = read ? -9 : 7;
  const start = { x: from.x + (onwards ? BOX.width : 0), y: from.y + BOX.height / 2 + lift };
  const end = { x: to.x + (onwards ? 0 : BOX.width), y: to.y + BOX.height / 2 + lift };
  const distance = Math.abs(end.x - start.x);
  const skipped = Math.max(0, Math.abs(to.column - from.column) - 1);
  const bulge = (read ? -1 : 1) * (skipped ? 44 + 20 * Math.min(skipped, 12) : read ? 10 : 0);
  const reach = (onwards ? 1 : -1) * Math.max(28, distance * (skipped ? 0.28 : 0.45));
  const first = { x: start.x + reach, y: start.y + bulge };
  const second = { x: end.x - reach, y: end.y + bulge };
  return {
    end,
    angle: (Math.atan2(end.y - second.y, end.x - second.x) * 180) / Math.PI,
    path: `M ${start.x} ${start.y} C ${first.x} ${first.y} ${second.x} ${second.y} ${end.x} ${end.y}`,
    middle: {
      x: (start.x + 3 * first.x + 3 * second.x + end.x) / 8,
      y: (start.y + 3 * first.y + 3 * second.y + end.y) / 8,
    },
  };
}
