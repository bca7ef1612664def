// Shared by all components: what they are made of. Text only ever becomes textContent.

const SVG = "http://www.w3.org/2000/svg";
// One record for each place that a component is drawn in; Streamlit calls it again for every change.
const PLACES = new WeakMap();

// What a place keeps between two calls, and whether what it is called with is new.
function placeOf(component, make) {
  const host = component.parentElement;
  let place = PLACES.get(host);
  if (!place) {
    place = make(host);
    place.root = element("div", "tracer");
    const known = place;
    document.addEventListener("tracer-news", (event) => {
      if (event.detail === known.channel && known.hear && known.root.isConnected) known.hear(newsOf(known));
    });
    host.appendChild(place.root);
    PLACES.set(host, place);
  }
  place.channel = component.data.channel;
  place.send = component.setTriggerValue;
  place.root.dataset.theme = themeOf(place.root);
  place.changed = place.rev !== component.data.rev;
  place.rev = component.data.rev;
  return place;
}

// What `tell` in mount.py said last.
function newsOf(place) {
  return window.tracerNews?.get(place.channel);
}

// Light or dark, by what Streamlit says the background is: its theme can change without a call to Python.
function themeOf(node) {
  const value = getComputedStyle(node).getPropertyValue("--st-background-color").trim();
  const canvas = document.createElement("canvas").getContext("2d");
  canvas.fillStyle = "#ffffff";
  canvas.fillStyle = value;
  const hex = /^#([0-9a-f]{2})([0-9a-f]{2})([0-9a-f]{2})$/i.exec(canvas.fillStyle);
  if (!hex) return "light";
  const [red, green, blue] = hex.slice(1).map((part) => parseInt(part, 16));
  return 0.299 * red + 0.587 * green + 0.114 * blue < 128 ? "dark" : "light";
}

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function svg(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
  return new DataView(bytes.buffer);
}

function percent(share) {
  const value = 100 * share;
  return `${value > 0 && value < 1 ? "<1" : Math.round(value)}%`;
}

function number(value, digits) {
  return value.toFixed(digits).replace("-", "\u2212");
}

// The colours of kinds, as custom properties of the place: both themes', the style sheet chooses.
function setLooks(root, looks) {
  looks.forEach((look, at) => {
    root.style.setProperty(`--kind-${at}-light`, look.light);
    root.style.setProperty(`--kind-${at}-dark`, look.dark);
  });
}

function setScale(root, scale) {
  for (const [name, value] of Object.entries(scale)) root.style.setProperty(`--${name}`, value);
}

function paintKind(node, kind) {
  node.style.setProperty("--kind-light", `var(--kind-${kind}-light)`);
  node.style.setProperty("--kind-dark", `var(--kind-${kind}-dark)`);
}

// A bar for a value from -1 to 1; with a sign beside it where there are signs at all.
function bar(value, signed) {
  const node = element("span", signed ? "bar signed" : "bar");
  const size = Math.min(1, Math.abs(value));
  if (size > 0.004) {
    const fill = element("span", value < 0 ? "fill lowers" : "fill raises");
    fill.style.width = `${(signed ? 50 : 100) * size}%`;
    node.appendChild(fill);
    if (signed) node.appendChild(element("span", value < 0 ? "sign lowers" : "sign raises", value < 0 ? "\u2212" : "+"));
  }
  return node;
}
