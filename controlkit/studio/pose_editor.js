// Joints that can be moved by mouse, touch and keyboard. The page gives element, props, trigger and watch.
// The drawing behind them is the server's; while a joint moves, lines stand in for it.
const SVG = "http://www.w3.org/2000/svg";
const root = element.querySelector(".pose-editor");
const STEP = 1, LEAP = 8; // pixels of the map per arrow key, and with Shift
let value = null, current = [0, 0], past = [], photoShown = true, timer = 0;
let told = "", toldAt = 0; // the joints that were told and are not answered yet, and since when
let givenUp = []; // those whose answer was not waited for any longer
let held = false, typed = 0; // whether a joint is under the pointer, and when one was last moved by a key
const BREADTH = 24; // pixels of the screen around a joint's middle that take hold of it
const PATIENCE = 5000; // milliseconds, after which no answer is waited for: the page was told what is wrong

function make(name, attributes, parent) {
  const node = document.createElementNS(SVG, name);
  for (const [key, given] of Object.entries(attributes)) node.setAttribute(key, given);
  if (parent) parent.appendChild(node);
  return node;
}

function button(text, run) {
  const node = document.createElement("button");
  node.type = "button";
  node.textContent = text;
  node.addEventListener("click", run);
  return node;
}

function visible(person, joint) {
  const point = value.people[person]?.[joint];
  return Boolean(point && point[2] > 0);
}

function order() {
  return value.people.flatMap((points, person) =>
    points.map((_, joint) => [person, joint]).filter(([p, j]) => visible(p, j)));
}

function name(person, joint) {
  const whose = value.people.length > 1 ? `, person ${person + 1}` : "";
  const [x, y] = value.people[person][joint];
  return `${JOINTS[joint]}${whose}, at ${Math.round(x)}, ${Math.round(y)}`;
}

function build() {
  root.replaceChildren();
  if (!value) return;
  const size = Math.max(value.width, value.height), all = order();
  if (!visible(...current)) current = all[0] ?? [0, 0];
  const svg = make("svg", { viewBox: `0 0 ${value.width} ${value.height}`, role: "application",
    "aria-label": "Pose: Page Up and Page Down choose a joint, arrow keys move it" }, root);
  make("rect", { width: value.width, height: value.height, fill: "#000" }, svg);
  if (photoShown) make("image", { href: value.photo, width: value.width, height: value.height, class: "photo" }, svg);
  make("image", { href: value.map, width: value.width, height: value.height, class: "drawn" }, svg);
  const lines = make("g", { class: "limbs", "stroke-width": 8 }, svg);
  const joints = make("g", {}, svg);
  value.people.forEach((_, person) => LIMBS.forEach(([from, to], k) => {
    if (visible(person, from) && visible(person, to))
      make("line", { stroke: COLOURS[k], "data-limb": `${person} ${from} ${to}` }, lines);
  }));
  for (const [person, joint] of all) {
    const node = make("circle", { r: size / 48, fill: COLOURS[joint], role: "button",
      "data-joint": `${person} ${joint}` }, joints);
    make("title", {}, node).textContent = name(person, joint);
    node.addEventListener("focus", () => { current = [person, joint]; stops(); });
    node.addEventListener("keydown", (event) => key(event, person, joint));
  }
  svg.addEventListener("pointerdown", (event) => {
    const node = near(event, svg);
    if (node) grab(event, node, ...node.dataset.joint.split(" ").map(Number));
  });
  const bar = document.createElement("div");
  bar.className = "pose-bar";
  const hint = document.createElement("span");
  hint.textContent = all.length ? "Drag a joint, or use the arrow keys." : "";
  const undo = button("Undo", back), found = button("As found", afresh);
  undo.disabled = !past.length;
  found.disabled = JSON.stringify(value.people) === JSON.stringify(value.found ?? value.people);
  bar.append(hint, undo, found, button("Save map", save), button(photoShown ? "Hide photo" : "Show photo", () => {
    photoShown = !photoShown;
    build();
    root.querySelector(".pose-bar button:last-child").focus();
  }));
  root.appendChild(bar);
  place();
}

// Puts every joint and line where it is now.
function place() {
  for (const node of root.querySelectorAll("circle")) {
    const [person, joint] = node.dataset.joint.split(" ").map(Number);
    node.setAttribute("cx", value.people[person][joint][0]);
    node.setAttribute("cy", value.people[person][joint][1]);
    node.setAttribute("aria-label", name(person, joint));
    node.querySelector("title").textContent = name(person, joint);
  }
  for (const node of root.querySelectorAll("line")) {
    const [person, from, to] = node.dataset.limb.split(" ").map(Number);
    ["x", "y"].forEach((axis, k) => {
      node.setAttribute(`${axis}1`, value.people[person][from][k]);
      node.setAttribute(`${axis}2`, value.people[person][to][k]);
    });
  }
  stops();
}

// One joint at a time is reached by Tab.
function stops() {
  for (const node of root.querySelectorAll("circle"))
    node.setAttribute("tabindex", node.dataset.joint === current.join(" ") ? 0 : -1);
}

function remember() {
  past = [...past.slice(-49), JSON.stringify(value.people)];
}

function move(person, joint, x, y) {
  const point = value.people[person][joint];
  point[0] = Math.min(Math.max(x, 0), value.width - 1);
  point[1] = Math.min(Math.max(y, 0), value.height - 1);
  root.classList.add("moving");
  place();
}

// One at a time: gradio would tell joints that came late by the value of the component, which an answer sets.
function tell() {
  const left = PATIENCE - (Date.now() - toldAt);
  if (told && left > 0) return timer || tellSoon(left); // moved again: told after the answer, or for want of it
  if (told) givenUp.push(told);
  [told, toldAt] = [JSON.stringify(value.people), Date.now()];
  props.value = { ...value, map: "", photo: "" };
  trigger("edited");
}

function tellSoon(milliseconds) {
  clearTimeout(timer);
  timer = setTimeout(() => { timer = 0; tell(); }, milliseconds);
}

// What was moved and not told yet is told at once: the next thing may be the button that generates.
function tellNow() {
  if (!timer) return;
  clearTimeout(timer);
  timer = 0;
  tell();
  if (JSON.stringify(value.people) !== told) props.value = { ...value, map: "", photo: "" };
}

function afresh() {
  remember();
  value.people = JSON.parse(JSON.stringify(value.found));
  root.classList.add("moving");
  place();
  tell();
}

function save() {
  const link = document.createElement("a");
  [link.href, link.download] = [value.map, "pose.png"];
  link.click();
}

// The joint that a finger means: the nearest one within its breadth.
function near(event, svg) {
  const found = [...svg.querySelectorAll("circle")].map((node) => {
    const box = node.getBoundingClientRect();
    const far = Math.hypot(event.clientX - box.x - box.width / 2, event.clientY - box.y - box.height / 2);
    return { node, far };
  }).sort((one, other) => one.far - other.far)[0];
  return found && found.far <= BREADTH ? found.node : null;
}

function back() {
  if (!past.length) return;
  value.people = JSON.parse(past.pop());
  root.classList.add("moving");
  place();
  tell();
}

function grab(event, node, person, joint) {
  event.preventDefault();
  node.focus();
  node.setPointerCapture(event.pointerId);
  remember();
  held = true;
  const svg = node.ownerSVGElement;
  const follow = (moved) => {
    const at = new DOMPoint(moved.clientX, moved.clientY).matrixTransform(svg.getScreenCTM().inverse());
    move(person, joint, at.x, at.y);
  };
  const drop = () => {
    for (const kind of ["pointerup", "pointercancel"]) node.removeEventListener(kind, drop);
    node.removeEventListener("pointermove", follow);
    held = false;
    tell();
  };
  node.addEventListener("pointermove", follow);
  node.addEventListener("pointerup", drop);
  node.addEventListener("pointercancel", drop);
}

function key(event, person, joint) {
  const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const all = order(), at = all.findIndex(([p, j]) => p === person && j === joint);
  const turns = { PageDown: at + 1, PageUp: at - 1, Home: 0, End: all.length - 1 };
  if (event.key in ways) {
    const [dx, dy] = ways[event.key], far = event.shiftKey ? LEAP : STEP, [x, y] = value.people[person][joint];
    if (Date.now() - typed > 250) remember();
    typed = Date.now();
    move(person, joint, x + dx * far, y + dy * far);
    tellSoon(250);
  } else if (event.key in turns) {
    const next = all[(turns[event.key] + all.length) % all.length];
    root.querySelector(`[data-joint="${next.join(" ")}"]`).focus();
  } else return;
  event.preventDefault();
}

watch("value", () => {
  const given = props.value;
  if (given && !given.map) return; // our own, on its way
  const joints = given ? JSON.stringify(given.people) : "";
  if (givenUp.includes(joints) && joints !== told) return; // an answer that comes after all
  const answered = told && told === joints;
  told = "";
  givenUp = [];
  if (answered && (held || JSON.stringify(value.people) !== joints)) {
    if (!held) tellSoon(0); // joints were moved since: this map is none of theirs
    return;
  }
  const fresh = !value || !given || given.photo !== value.photo || given.width !== value.width;
  if (fresh) past = [];
  const focused = root.contains(document.activeElement) && document.activeElement.dataset?.joint;
  value = given ? JSON.parse(JSON.stringify(given)) : null;
  root.classList.remove("moving");
  build();
  if (focused) root.querySelector(`[data-joint="${focused}"]`)?.focus();
});
root.addEventListener("focusout", tellNow);
value = props.value && props.value.map ? JSON.parse(JSON.stringify(props.value)) : null;
build();
