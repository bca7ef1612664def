// What a step read, most first: a button for each thing that can be opened.

export default function (component) {
  const place = placeOf(component, () => ({ rev: null }));
  if (!place.changed) return;
  const { data } = component;
  setLooks(place.root, data.looks);
  setScale(place.root, data.scale);
  const list = element("ol", "sources");
  list.setAttribute("aria-label", "What the step read, most first");
  if (data.through) list.appendChild(heading());
  const largest = Math.max(...data.rows.map((row) => Math.max(row.share, row.through ?? 0)), 1e-9);
  data.rows.forEach((row, at) => {
    const entry = element("li");
    entry.appendChild(line(place, data, row, at, largest));
    list.appendChild(entry);
  });
  list.addEventListener("keydown", onKey);
  place.root.replaceChildren(list);
}

function heading() {
  const node = element("li", "head");
  node.setAttribute("aria-hidden", "true");
  node.append(element("span", "what", ""), element("span", "amount", "directly"), element("span", "amount", "through steps"));
  return node;
}

function line(place, data, row, at, largest) {
  const look = data.looks[row.look];
  const node = element(row.open ? "button" : "div", "source");
  paintKind(node, row.look);
  const what = element("span", "what");
  const title = element("span", "title");
  title.append(element("span", "kind", `${look.cue} ${look.label}`));
  if (row.where) title.append(element("span", "where", row.where));
  what.append(title, element("span", "says", row.text));
  node.append(element("span", "stripe"), what, amount(row.share, row.sign, data.signed, largest));
  if (data.through) node.append(amount(row.through ?? 0, 1, false, largest));
  node.setAttribute("aria-label", spoken(data, row, look));
  if (row.open) node.addEventListener("click", () => place.send("open", at));
  return node;
}

function amount(share, sign, signed, largest) {
  const node = element("span", "amount");
  const size = share / largest;
  node.append(bar(signed && sign < 0 ? -size : size, signed), element("span", "figure", percent(share)));
  return node;
}

function spoken(data, row, look) {
  const way = data.signed ? (row.sign < 0 ? ", lowers it" : ", raises it") : "";
  const through = data.through ? `, ${percent(row.through ?? 0)} through steps` : "";
  return `${look.label} ${row.where}: ${percent(row.share)}${way}${through}. ${row.text}`;
}

function onKey(event) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  const buttons = [...event.currentTarget.querySelectorAll("button")];
  const at = buttons.indexOf(event.target);
  buttons[at + step]?.focus();
  event.preventDefault();
}
