// SPDX-License-Identifier: MIT
"use strict";
// Draws the timeline and the rates. Text from the capture only ever becomes text nodes.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);

  const WHO = ["nothing", "a page filled by L1", "a page filled by L2", "a page filled in SMM", "a page (filler unknown)"];
  const LEVELS = ["L1", "L2", "SMM", "an unknown level"];
  const SEVERITIES = ["info", "warning", "critical"];
  const MEMORY = 4, STALE = 8, UNSEEN = 255;
  const BAR = 22, LEVEL_Y = 24, LEVEL = 5, TICKS_Y = 31, TICKS = 14, LANE = 46, RATE = 30;

  const unpack = (text, Kind) => {
    const raw = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Kind(raw.buffer);
  };
  const make = (name, attributes = {}, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const html = (name, className, text) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const duration = (ns, digits = 3) => {
    for (const [unit, size] of [["s", 1e9], ["ms", 1e6], ["us", 1e3]])
      if (Math.abs(ns) >= size) return `${+(ns / size).toFixed(digits)} ${unit}`;
    return `${Math.round(ns)} ns`;
  };
  const number = (n) => n.toLocaleString("en-US");

  // ---- the data ----------------------------------------------------------------------------
  const lanes = data.lanes.all.map((lane) => ({
    ...lane,
    bin: unpack(lane.bin, Uint32Array), held: unpack(lane.held, Uint32Array),
    after: unpack(lane.after, Uint8Array), levels: unpack(lane.levels, Uint8Array),
    level: unpack(lane.level, Uint8Array), matches: unpack(lane.matches, Uint32Array),
    hits: unpack(lane.hits, Uint32Array), page: unpack(lane.page, Uint16Array),
    title: `VM ${lane.vm}${lane.name ? ` (${lane.name})` : ""}, vCPU ${lane.vcpu}`,
  }));
  const rates = data.rates.all.map((row) => ({ ...row, counts: unpack(row.counts, Float64Array) }));
  const findings = [...data.findings].sort((a, b) => a.first - b.first);
  const span = Math.max(data.span, 1000);
  const whole = { from: -span * 0.01, to: span * 1.01 };
  const closest = Math.max(200, data.lanes.width / 4);
  let view = { ...whole }, cursor = null, chosen = 0, current = -1;

  const timeOf = (lane, i) => data.lanes.offset + lane.bin[i] * data.lanes.width;
  // The last bin of a lane that begins at or before t; -1: none.
  const binAt = (lane, t) => {
    let low = 0, high = lane.bin.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (timeOf(lane, middle) <= t) low = middle + 1; else high = middle;
    }
    return low - 1;
  };

  // ---- tracks ------------------------------------------------------------------------------
  const tracks = [];
  const addTrack = (parent, height, title, note, draw, lane) => {
    const box = html("div", "track");
    if (title) {
      const head = html("h4");
      head.append(html("span", "", title), html("small", "", note));
      box.append(head);
    }
    const svg = make("svg", { height, "aria-hidden": "true" });
    box.append(svg);
    parent.append(box);
    tracks.push({ box, svg, height, draw, lane });
    return box;
  };
  const rect = (x, y, width, height) => `M${x} ${y}h${width}v${height}h${-width}z`;
  const path = (svg, className, d) => { if (d) svg.append(make("path", { class: className, d })); };

  // Columns of pixels: what is true in each, so that nothing is lost however narrow it is.
  const columns = (lane, width, perNs) => {
    const held = new Uint32Array(width), levels = new Uint8Array(width);
    const matches = new Float64Array(width), hits = new Float64Array(width);
    const put = (from, to, state, level) => {
      const first = Math.max(0, Math.floor((from - view.from) * perNs));
      const last = Math.min(width, Math.max(first + 1, Math.ceil((to - view.from) * perNs)));
      for (let x = first; x < last; x++) { held[x] |= state; levels[x] |= level; }
    };
    for (let i = Math.max(0, binAt(lane, view.from)); i < lane.bin.length; i++) {
      const from = timeOf(lane, i), to = from + data.lanes.width;
      if (from > view.to) break;
      const next = i + 1 < lane.bin.length ? timeOf(lane, i + 1) : Infinity;
      if (to >= view.from) {
        put(from, to, lane.held[i], lane.levels[i]);
        const x = Math.min(width - 1, Math.max(0, Math.floor((from - view.from) * perNs)));
        matches[x] += lane.matches[i]; hits[x] += lane.hits[i];
      }
      const end = Math.min(next, span);
      if (end > to && end > view.from)
        put(to, end, lane.after[i] === UNSEEN ? 0 : 1 << lane.after[i], 1 << lane.level[i]);
    }
    return { held, levels, matches, hits };
  };
  const runs = (values, each) => {
    for (let x = 0; x < values.length;) {
      let end = x + 1;
      while (end < values.length && values[end] === values[x]) end++;
      if (values[x]) each(x, end - x, values[x]);
      x = end;
    }
  };
  const bits = (mask) => {
    const out = [];
    for (let bit = 0; bit < 17; bit++) if (mask & (1 << bit)) out.push(bit);
    return out;
  };
  // 0 is empty, 1 to 4 say who filled it; MEMORY and STALE are added to that.
  const staleOf = (state) => state > STALE;
  const fresh = (state) => (staleOf(state) ? state - STALE : state);
  const memoryOf = (state) => fresh(state) > MEMORY;
  const who = (state) => (memoryOf(state) ? fresh(state) - MEMORY : fresh(state));

  const drawLane = (svg, width, perNs, lane) => {
    const seen = columns(lane, width, perNs);
    const bright = ["", "", "", "", ""], pale = ["", "", "", "", ""], level = ["", "", "", ""];
    let edge = "", ticks = "", hits = "";
    runs(seen.held, (x, w, mask) => {
      const states = bits(mask), height = BAR / states.length;
      states.forEach((state, n) => {
        const part = rect(x, +(n * height).toFixed(2), w, +height.toFixed(2));
        (staleOf(state) ? pale : bright)[who(state)] += part;
      });
      if (states.some(memoryOf)) edge += rect(x, BAR - 5, w, 5);
    });
    runs(seen.levels, (x, w, mask) => {
      for (const bit of [1, 2, 3]) if (mask & (1 << bit)) level[bit] += rect(x, LEVEL_Y, w, LEVEL);
    });
    const most = Math.log2(2 + Math.max(...seen.matches));
    for (let x = 0; x < width; x++) {
      if (seen.matches[x]) {
        const h = +(3 + (TICKS - 3) * Math.log2(1 + seen.matches[x]) / most).toFixed(1);
        ticks += rect(x - 0.5, TICKS_Y + TICKS - h, 2, h);
      }
      if (seen.hits[x]) hits += rect(x - 1, TICKS_Y, 3, TICKS);
    }
    svg.append(make("rect", { class: "base", x: 0, y: LEVEL_Y, width, height: LEVEL }));
    bright.forEach((d, n) => path(svg, `h${n}`, d));
    pale.forEach((d, n) => path(svg, `h${n} pale`, d));
    path(svg, "edge", edge);
    level.forEach((d, n) => path(svg, `lv${n}`, d));
    path(svg, "ticks", ticks);
    path(svg, "hits", hits);
    for (const finding of findings)
      if (finding.vm === lane.vm && finding.vcpu === lane.vcpu) drawMarks(svg, finding, BAR / 2 - 1, perNs, width);
  };
  const drawMarks = (svg, finding, y, perNs, width) => {
    const taken = new Set();
    for (const at of [finding.first, ...finding.marks]) {
      const x = Math.round((at - view.from) * perNs), r = at === finding.first ? 7 : 4;
      if (x < -r || x > width + r || taken.has(x)) continue;
      taken.add(x);
      const mark = make("path", { class: `f-mark f-${finding.severity}`, d: `M${x} ${y - r}l${r} ${r}l${-r} ${r}l${-r} ${-r}z`, "data-go": finding.id });
      mark.append(make("title", {}, `${finding.rule}: ${finding.severity}`));
      svg.append(mark);
    }
  };
  // Always the whole recording, with what the tracks below show of it in a frame.
  const drawOverview = (svg, width) => {
    const perNs = width / (whole.to - whole.from);
    const at = (t) => (t - whole.from) * perNs;
    svg.append(make("rect", { class: "base", x: 0, y: 3, width, height: 14 }));
    const from = at(view.from), size = Math.max(6, at(view.to) - from);
    svg.append(make("rect", { class: "frame", x: Math.min(width - size, from) + 0.5, y: 0.5, width: size - 1, height: 19, rx: 3 }));
    for (const severity of SEVERITIES) {
      let bands = "", marks = "";
      for (const finding of findings) {
        if (finding.severity !== severity) continue;
        const x = at(finding.first);
        bands += rect(x.toFixed(1), 5, Math.max(2, at(finding.last) - x).toFixed(1), 10);
        marks += `M${x.toFixed(1)} 5l5 5l-5 5l-5 -5z`;
      }
      path(svg, `f-${severity} f-span`, bands);
      path(svg, `f-${severity}`, marks);
    }
  };
  const drawAxis = (svg, width, perNs) => {
    const wanted = (view.to - view.from) / Math.max(2, Math.floor(width / 110));
    const power = 10 ** Math.floor(Math.log10(wanted));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= wanted);
    const digits = Math.max(0, Math.min(9, -Math.floor(Math.log10(step / 1e9))));
    const first = Math.ceil((view.from + data.start) / step) * step;
    for (let t = first; t - data.start <= view.to; t += step) {
      const x = +((t - data.start - view.from) * perNs).toFixed(1);
      svg.append(make("path", { class: "grid", d: `M${x} 15v5` }));
      const anchor = x < 30 ? "start" : x > width - 40 ? "end" : "middle";
      svg.append(make("text", { x, y: 11, "text-anchor": anchor }, `${(t / 1e9).toFixed(digits)} s`));
    }
  };
  const drawRate = (svg, width, perNs, row) => {
    const tall = new Float64Array(width);
    const first = Math.max(0, Math.floor((view.from - data.rates.offset) / data.rates.width));
    for (let i = first; i < row.counts.length; i++) {
      const from = data.rates.offset + i * data.rates.width;
      if (from > view.to) break;
      const x0 = Math.max(0, Math.floor((from - view.from) * perNs));
      const x1 = Math.min(width, Math.max(x0 + 1, Math.ceil((from + data.rates.width - view.from) * perNs)));
      for (let x = x0; x < x1; x++) tall[x] = Math.max(tall[x], row.counts[i]);
    }
    let d = "";
    runs(tall, (x, w, count) => {
      const h = +Math.max(2, RATE * count / row.most).toFixed(1);
      d += rect(x - (row.name === "LOSS" && w < 3 ? 1 : 0), RATE - h, row.name === "LOSS" ? Math.max(3, w) : w, h);
    });
    svg.append(make("rect", { class: "base", x: 0, y: RATE - 1, width, height: 1 }));
    path(svg, row.name === "LOSS" ? "lost" : "area", d);
  };

  // ---- building and drawing ----------------------------------------------------------------
  const board = byId("lanes"), rows = byId("rate-rows");
  const overview = addTrack(board, 20, "The whole recording", `${number(findings.length)} finding${findings.length === 1 ? "" : "s"}`, drawOverview);
  const mainAxis = addTrack(board, 20, "", "", drawAxis);
  mainAxis.classList.add("axis");
  const lossRow = rates.find((row) => row.name === "LOSS");
  const ordered = rates.filter((row) => row !== lossRow).sort((a, b) => b.total - a.total);
  for (const row of rates) row.most = row.counts.reduce((a, b) => Math.max(a, b), 1);
  const rateNote = (row) => {
    const what = row.name === "LOSS" ? "records" : "events";
    return `${number(row.total)} ${what}, at most ${number(Math.round(row.most * 1e9 / Math.max(data.rates.width, 1)))}/s`;
  };
  const lossTrack = (parent) => addTrack(parent, RATE, "Lost records", rateNote(lossRow), (s, w, p) => drawRate(s, w, p, lossRow));
  if (lossRow) lossTrack(board);
  for (const lane of lanes)
    lane.box = addTrack(board, LANE, lane.title, `${number(lane.events)} events`, (s, w, p) => drawLane(s, w, p, lane), lane);
  if (rates.length) addTrack(rows, 20, "", "", drawAxis).classList.add("axis");
  if (lossRow) lossTrack(rows);
  for (const row of ordered) addTrack(rows, RATE, row.name, rateNote(row), (s, w, p) => drawRate(s, w, p, row));

  let pending = false;
  const draw = (all) => {
    pending = false;
    for (const track of tracks) {
      const place = track.box.getBoundingClientRect();
      if (!all && (place.bottom < -200 || place.top > innerHeight + 200)) continue;
      const width = Math.max(50, Math.round(track.svg.getBoundingClientRect().width));
      track.svg.setAttribute("viewBox", `0 0 ${width} ${track.height}`);
      track.svg.replaceChildren();
      track.draw(track.svg, width, width / (view.to - view.from));
      if (track.box !== overview && cursor !== null && cursor >= view.from && cursor <= view.to) {
        const x = Math.round((cursor - view.from) * width / (view.to - view.from)) + 0.5;
        track.svg.append(make("path", { class: "cursor", d: `M${x} 0v${track.height}` }));
      }
    }
    byId("span").textContent = `${duration(Math.min(span, view.to - view.from))} of ${duration(span)}`;
  };
  const soon = () => { if (!pending) { pending = true; requestAnimationFrame(() => draw(false)); } };

  const look = (from, to) => {
    const most = whole.to - whole.from;
    const size = Math.min(most, Math.max(closest, to - from));
    const middle = (from + to) / 2;
    const start = Math.min(whole.to - size, Math.max(whole.from, middle - size / 2));
    view = { from: start, to: start + size };
    soon();
  };
  const zoom = (factor, at = (view.from + view.to) / 2) =>
    look(at - (at - view.from) * factor, at + (view.to - at) * factor);
  const pan = (part) => { const by = (view.to - view.from) * part; look(view.from + by, view.to + by); };

  const tell = (lane, t) => {
    const i = lane ? binAt(lane, t) : -1;
    const when = `${duration(t + data.start, 6)} after the start`;
    if (i < 0) return `${lane ? `${lane.title}, ` : ""}${when}: nothing was seen yet.`;
    const inside = t < timeOf(lane, i) + data.lanes.width;
    const states = inside ? bits(lane.held[i]) : lane.after[i] === UNSEEN ? [] : [lane.after[i]];
    const levels = bits(inside ? lane.levels[i] : 1 << lane.level[i]).map((n) => LEVELS[n]);
    const page = data.lanes.pages[lane.page[i]];
    const held = states.map((s) => WHO[who(s)] + (memoryOf(s) ? ", where memory stands" : "") + (staleOf(s) ? ", out of date" : ""));
    const parts = [`${lane.title}, ${when}: ran ${levels.join(" and ")}`,
      held.length ? `the cache held ${held.join("; then ")}${page === "0x0" ? "" : ` (${page})`}` : "what the cache held is not known"];
    if (inside && lane.matches[i]) parts.push(`believed ${lane.matches[i] === 1 ? "once" : `${number(lane.matches[i])} times`}${lane.hits[i] ? `, ${number(lane.hits[i])} for memory` : ""}`);
    return `${parts.join("; ")}.`;
  };
  const choose = (index) => {
    if (!lanes.length) return;
    lanes[chosen].box.classList.remove("chosen");
    chosen = Math.min(lanes.length - 1, Math.max(0, index));
    lanes[chosen].box.classList.add("chosen");
  };
  const say = () => { byId("readout").textContent = tell(lanes[chosen], cursor ?? (view.from + view.to) / 2); };

  const goTo = (finding) => {
    current = findings.indexOf(finding);
    const last = finding.marks.reduce((a, b) => Math.max(a, b), finding.first);
    const begin = finding.marks.reduce((a, b) => Math.min(a, b), finding.first);
    const room = Math.max((last - begin) * 0.6, data.lanes.width * 40, 2e4);
    cursor = finding.first;
    look(begin - room, last + room);
    const index = lanes.findIndex((lane) => lane.vm === finding.vm && lane.vcpu === finding.vcpu);
    if (index >= 0) choose(index);
    byId("readout").textContent = `${finding.rule} (${finding.severity}). ${index >= 0 ? tell(lanes[index], cursor) : "Its vCPU has no lane."}`;
  };
  const step = (by) => { if (findings.length) goTo(findings[(current + by + findings.length) % findings.length]); };
  const all = () => { cursor = null; look(whole.from, whole.to); say(); };
  const actions = {
    in: () => zoom(0.5), out: () => zoom(2), left: () => pan(-0.25), right: () => pan(0.25), fit: all,
    next: () => step(1), previous: () => step(current < 0 ? 0 : -1),
  };
  for (const button of document.querySelectorAll("[data-do]"))
    button.addEventListener("click", () => { actions[button.dataset.do](); });
  for (const button of document.querySelectorAll("[data-finding]"))
    button.addEventListener("click", () => {
      goTo(findings.find((finding) => finding.id === button.dataset.finding));
      byId("timeline").scrollIntoView();
      board.focus({ preventScroll: true });
    });

  const moveCursor = (part) => {
    const size = view.to - view.from;
    cursor = Math.min(span, Math.max(0, (cursor ?? view.from + size / 2) + part * size));
    if (cursor < view.from + size * 0.05 || cursor > view.to - size * 0.05) pan(part > 0 ? 0.25 : -0.25);
    soon(); say();
  };
  const keys = {
    ArrowLeft: () => moveCursor(-0.02), ArrowRight: () => moveCursor(0.02),
    ArrowUp: () => { choose(chosen - 1); say(); }, ArrowDown: () => { choose(chosen + 1); say(); },
    PageUp: () => pan(-0.8), PageDown: () => pan(0.8),
    "+": () => zoom(0.5, cursor ?? undefined), "=": () => zoom(0.5, cursor ?? undefined), "-": () => zoom(2, cursor ?? undefined),
    0: all, Home: all, n: () => step(1), N: () => step(1), p: () => actions.previous(), P: () => actions.previous(),
    Escape: () => { cursor = null; soon(); },
  };
  board.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });

  // ---- pointer -----------------------------------------------------------------------------
  const area = () => mainAxis.lastChild.getBoundingClientRect();
  const timeAt = (x) => { const a = area(); return view.from + (x - a.left) / a.width * (view.to - view.from); };
  const fingers = new Map();
  let moved = 0;
  board.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.shiftKey && Math.abs(event.deltaX) <= Math.abs(event.deltaY)) return;
    event.preventDefault();
    if (event.ctrlKey) zoom(Math.exp(event.deltaY * 0.004), timeAt(event.clientX));
    else pan((event.deltaX || event.deltaY) / area().width);
  }, { passive: false });
  board.addEventListener("pointerdown", (event) => { fingers.set(event.pointerId, event.clientX); moved = 0; });
  board.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (before === undefined) {
      if (event.pointerType === "mouse") point(event);
      return;
    }
    moved += Math.abs(event.clientX - before);
    if (moved > 4 && !board.hasPointerCapture(event.pointerId)) { board.setPointerCapture(event.pointerId); board.classList.add("drag"); }
    const scale = (view.to - view.from) / area().width;
    if (fingers.size === 1) look(view.from - (event.clientX - before) * scale, view.to - (event.clientX - before) * scale);
    else {
      const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
      const old = Math.abs(before - other), now = Math.abs(event.clientX - other);
      if (old > 5 && now > 5) zoom(old / now, timeAt(other));
    }
    fingers.set(event.pointerId, event.clientX);
  });
  const point = (event) => {
    const box = event.target.closest(".track");
    if (box === overview) {
      if (event.type !== "pointerup") return;
      const a = area(), half = (view.to - view.from) / 2;
      const middle = whole.from + (event.clientX - a.left) / a.width * (whole.to - whole.from);
      look(middle - half, middle + half);
      return;
    }
    const index = lanes.findIndex((lane) => lane.box === box);
    if (index >= 0) choose(index);
    cursor = Math.min(span, Math.max(0, timeAt(event.clientX)));
    soon(); say();
  };
  const up = (event) => {
    fingers.delete(event.pointerId);
    board.classList.remove("drag");
    if (event.type !== "pointerup" || moved > 4) return;
    const id = event.target.dataset?.go;
    if (!id) { point(event); return; }
    const card = byId(id);
    for (let node = card.parentElement; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
    document.querySelectorAll(".aim").forEach((node) => node.classList.remove("aim"));
    card.classList.add("aim");
    card.scrollIntoView();
    card.focus({ preventScroll: true });
  };
  board.addEventListener("pointerup", up);
  board.addEventListener("pointercancel", up);

  // ---- the page ----------------------------------------------------------------------------
  byId("honest").textContent = `Drawn in steps of ${duration(data.lanes.width)}; a step shows everything that was true in it, so no finding, match or loss is left out.`
    + (data.lanes.undrawn ? ` ${number(data.lanes.undrawn)} more vCPUs, the least busy without a finding, have no lane.` : "");
  addEventListener("resize", soon);
  addEventListener("scroll", soon, { passive: true });
  addEventListener("beforeprint", () => draw(true));
  choose(0);
  for (const name of ["next", "previous"]) document.querySelector(`[data-do=${name}]`).hidden = !findings.length;
  const worst = [...findings].sort((a, b) => SEVERITIES.indexOf(b.severity) - SEVERITIES.indexOf(a.severity))[0];
  if (worst) goTo(worst); else say();
  draw(true);
})();
