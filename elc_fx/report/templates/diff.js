"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const map = $("map"), blocks = [...document.querySelectorAll(".block")], panel = $("panel"), ruler = $("ruler");
  const changes = JSON.parse($("changes").textContent);
  const texts = changes.map((c) => [c.kind, ...[...c.before, ...c.after].flatMap((l) => [l.place, l.operation, l.kind])]
    .join(" ").toLowerCase());
  const heads = document.querySelector(".heads");
  let current = -1, zoom = 1;

  // What is shown.

  const shown = (i) => !blocks[i].classList.contains("off");
  const chips = [...document.querySelectorAll(".chip")];

  function filter() {
    const kinds = new Set(chips.filter((c) => c.getAttribute("aria-pressed") === "true").map((c) => c.dataset.kind));
    let skipped = false;
    blocks.forEach((block, i) => {
      const off = !kinds.has(changes[i].kind);
      block.classList.toggle("off", off);
      block.classList.toggle("skips", !off && skipped);
      skipped = off;
    });
    search();
    drawRuler();
  }

  chips.forEach((chip) => chip.addEventListener("click", () => {
    chip.setAttribute("aria-pressed", chip.getAttribute("aria-pressed") !== "true");
    filter();
  }));

  function setZoom(to) {
    const middle = (map.scrollTop + map.clientHeight / 2) / map.scrollHeight;
    zoom = Math.min(4, Math.max(0.001, to));
    $("blocks").style.setProperty("--zoom", zoom);
    map.scrollTop = middle * map.scrollHeight - map.clientHeight / 2;
    drawRuler();
  }

  function fit() {
    const head = heads.offsetHeight;
    if (zoom === 1) setZoom(Math.min(0.99, (map.clientHeight - head - 4) / (map.scrollHeight - head)));
    else { setZoom(1); if (current >= 0) show(current); }
  }

  function drawRuler() {
    map.style.setProperty("--head", `${heads.offsetHeight / zoom}px`);
    ruler.replaceChildren();
    const whole = map.scrollHeight, box = map.getBoundingClientRect();
    const mark = (top, height, kind) => {
      const line = document.createElement("i");
      line.className = kind;
      line.style.top = `${100 * top / whole}%`;
      line.style.height = `${100 * height / whole}%`;
      ruler.append(line);
    };
    blocks.forEach((block, i) => {
      if (changes[i].kind === "kept" || !shown(i)) return;
      const at = block.getBoundingClientRect();
      mark(at.top - box.top + map.scrollTop, at.height, changes[i].kind);
    });
    mark(map.scrollTop, map.clientHeight, "view");
  }

  map.addEventListener("scroll", () => {
    const view = ruler.querySelector(".view");
    if (view) view.style.top = `${100 * map.scrollTop / map.scrollHeight}%`;
  }, { passive: true });
  ruler.addEventListener("click", (event) => {
    const box = ruler.getBoundingClientRect();
    map.scrollTop = (event.clientY - box.top) / box.height * map.scrollHeight - map.clientHeight / 2;
  });
  addEventListener("resize", drawRuler);

  // The search.

  const words = () => $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const hits = () => blocks.map((_, i) => i).filter((i) => shown(i) && words().every((word) => texts[i].includes(word)));

  function search() {
    const searching = words().length > 0, found = searching ? hits() : [];
    map.classList.toggle("searching", searching);
    blocks.forEach((block) => block.classList.remove("hit"));
    found.forEach((i) => blocks[i].classList.add("hit"));
    $("found").textContent = searching ? (found.length ? `${found.length} found` : "none found") : "";
    return found;
  }

  function toHit(step) {
    const found = search();
    if (!found.length) return;
    const next = step > 0 ? found.find((i) => i > current) : found.findLast((i) => i < current);
    const at = next ?? (step > 0 ? found[0] : found.at(-1));
    select(at, false);
    $("found").textContent = `${found.indexOf(at) + 1} of ${found.length}`;
  }

  $("search").addEventListener("input", () => { const found = search(); if (found.length) show(found[0]); });
  $("search").addEventListener("keydown", (event) => {
    if (event.key === "Enter") { toHit(event.shiftKey ? -1 : 1); event.preventDefault(); }
    if (event.key === "Escape") { $("search").value = ""; search(); focus(current >= 0 && shown(current) ? current : first()); }
    event.stopPropagation();
  });

  // One change.

  const show = (i) => blocks[i].scrollIntoView({ block: "nearest" });

  function focus(i) {
    if (!blocks[i] || !shown(i)) return;
    blocks.forEach((block) => { block.tabIndex = -1; });
    blocks[i].tabIndex = 0;
    blocks[i].focus({ preventScroll: true });
    show(i);
  }

  function select(i, focused = true) {
    if (!blocks[i] || !shown(i)) return;
    if (current >= 0) blocks[current].setAttribute("aria-selected", "false");
    current = i;
    blocks[i].setAttribute("aria-selected", "true");
    describe(changes[i]);
    if (focused) focus(i); else show(i);
    history.replaceState(null, "", `#change-${i}`);
    drawRuler();
  }

  function open(kind, title, ...parts) {
    const button = element("button", "×", "close");
    button.setAttribute("aria-label", "Close");
    button.addEventListener("click", () => { close(); focus(current >= 0 ? current : first()); });
    panel.className = `panel ${kind}`;
    panel.replaceChildren(button, element("h3", title), ...parts);
    panel.hidden = false;
    panel.scrollTop = 0;
  }

  function close() {
    panel.hidden = true;
    if (current >= 0) blocks[current].setAttribute("aria-selected", "false");
    drawRuler();
  }

  const element = (name, text = "", className = "") => Object.assign(document.createElement(name), { textContent: text, className });
  const number = (n) => n === null || n === undefined ? "–" : n.toLocaleString("en");
  const by = (values) => values && values.length ? values.join("×") : "–";

  function describe(change) {
    const facts = element("dl");
    const fact = (name, text) => facts.append(element("dt", name), element("dd", text));
    const pair = (name, [a, b]) => {
      if (a === null || b === null || (!a && !b)) return;
      const share = a && change.after.length ? ` (${(100 * (b / a - 1)).toFixed(1).replace("-", "−")} %)` : "";
      fact(name, `${number(a)} → ${number(b)}${a === b ? "" : share}`);
    };
    pair("FLOPs", change.flops);
    pair("parameters", change.parameters);
    if (change.loss !== null) fact("predicted loss", change.loss.toPrecision(3));
    const [old, made] = [change.before[0], change.after[0]];
    if (change.kind === "changed" && old.operation === made.operation && old.settings !== made.settings) {
      fact("was", old.settings);
      fact("is", made.settings);
    }
    if (change.retrained) fact("weights", "other numbers than before");
    if (change.rewired) fact("reads", "other layers than before");
    open(change.kind, `${change.kind}: ${change.name}`, facts);
    const same = change.kind === "kept" && !change.retrained && !change.rewired;
    for (const side of same ? ["after"] : ["before", "after"]) {
      const wide = element("div", "", "wide");
      const title = same ? "before and after" : change[side].length ? side : `nothing ${side}`;
      panel.append(element("h4", title), wide);
      if (change[side].length) wide.append(table(change[side]));
    }
  }

  function table(layers) {
    const made = element("table"), head = made.createTHead().insertRow(), body = made.createTBody();
    for (const name of ["layer", "operation", "kernel", "output", "FLOPs", "parameters"]) head.append(element("th", name));
    for (const layer of layers) {
      const row = body.insertRow();
      const cells = [layer.place, layer.operation, by(layer.kernel), by(layer.shape), number(layer.flops), number(layer.parameters)];
      cells.forEach((text, i) => { const cell = row.insertCell(); cell.textContent = text; if (i < 2) cell.className = "left"; });
      row.title = layer.settings;
    }
    head.children[1].className = "left";
    return made;
  }

  blocks.forEach((block, i) => block.addEventListener("click", () => { if (!dragged) select(i); }));

  // Keys, wheel, dragging.

  const step = (from, by, wanted) => {
    for (let i = from + by; i >= 0 && i < blocks.length; i += by) if (shown(i) && wanted(changes[i])) return i;
    return -1;
  };
  const any = () => true, changed = (c) => c.kind !== "kept";
  const focused = () => blocks.indexOf(document.activeElement);
  const first = () => step(-1, 1, any), last = () => step(blocks.length, -1, any);

  const keys = {
    "/": () => { $("search").focus(); $("search").select(); },
    "+": () => setZoom(zoom * 1.25), "=": () => setZoom(zoom * 1.25), "-": () => setZoom(zoom / 1.25), "0": fit, "?": help,
    ArrowDown: (at) => focus(step(at, 1, any)), ArrowUp: (at) => focus(step(at, -1, any)),
    j: (at) => focus(step(at, 1, any)), k: (at) => focus(step(at, -1, any)),
    n: (at) => select(step(at, 1, changed)), p: (at) => select(step(at, -1, changed)),
    Home: () => focus(first()), End: () => focus(last()),
    Enter: (at) => { if (at >= 0) select(at); }, " ": (at) => { if (at >= 0) select(at); },
    Escape: () => close(),
  };

  const scrolling = ["ArrowDown", "ArrowUp", "Home", "End", " "];

  document.addEventListener("keydown", (event) => {
    const inside = $("diff").contains(event.target), nowhere = event.target === document.body;
    if (event.ctrlKey || event.metaKey || event.altKey || !(inside || nowhere)) return;
    if ((nowhere || panel.contains(event.target)) && scrolling.includes(event.key)) return;  // what is not the map
    if (event.target.tagName === "BUTTON" && ["Enter", " "].includes(event.key)) return;
    const chip = chips[Number(event.key) - 1];
    const action = chip ? () => chip.click() : keys[event.key];
    if (!action) return;
    const at = focused();
    action(at >= 0 ? at : current);
    event.preventDefault();
  });

  map.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    setZoom(zoom * Math.exp(-event.deltaY / 300));
    event.preventDefault();
  }, { passive: false });

  let dragged = false;
  map.addEventListener("pointerdown", (event) => {
    dragged = false;
    if (event.pointerType !== "mouse" || event.button !== 0) return;
    const start = [event.clientX, event.clientY, map.scrollLeft, map.scrollTop];
    const move = (e) => {
      if (Math.hypot(e.clientX - start[0], e.clientY - start[1]) < 5) return;
      dragged = true;
      map.classList.add("dragging");
      map.scrollTo(start[2] - e.clientX + start[0], start[3] - e.clientY + start[1]);
    };
    const end = () => { removeEventListener("pointermove", move); removeEventListener("pointerup", end); map.classList.remove("dragging"); };
    addEventListener("pointermove", move);
    addEventListener("pointerup", end);
  });

  function help() {
    const list = element("dl");
    for (const [key, text] of [["/", "search; Enter and Shift+Enter go from hit to hit"], ["↓ ↑ (j k)", "next, previous"],
      ["n p", "next, previous change"], ["Enter", "what became of it"], ["Esc", "close"],
      ["+ − 0", "larger, smaller, all of it; also Ctrl and the wheel. Drag to pan"], [`1–${chips.length}`, "show or hide a kind"]]) {
      list.append(element("dt", key), element("dd", text));
    }
    open("", "Keys", list);
    drawRuler();
  }

  $("in").addEventListener("click", () => setZoom(zoom * 1.25));
  $("out").addEventListener("click", () => setZoom(zoom / 1.25));
  $("fit").addEventListener("click", fit);
  $("help").addEventListener("click", help);
  if (blocks.length) blocks[0].tabIndex = 0;
  const linked = /^#change-(\d+)$/.exec(location.hash);
  if (linked && blocks[linked[1]]) select(Number(linked[1]));
  drawRuler();
})();
