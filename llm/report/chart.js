"use strict";
// Draws line charts in SVG with logarithmic axes, a legend that hides series, values at the pointer, and zoom by dragging.

const SVG = "http://www.w3.org/2000/svg";

function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function shape(parent, name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function compact(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3) return value.toExponential(1).replace(".0e", "e");
  if (size < 1000) return String(Number(value.toPrecision(3)));
  const suffixes = ["K", "M", "G", "T", "P", "E", "Z"];
  let scaled = value;
  for (const suffix of suffixes) {
    scaled /= 1000;
    if (Math.abs(scaled) < 999.5 || suffix === "Z") return Number(scaled.toPrecision(3)) + " " + suffix;
  }
  return String(value);
}

function seconds(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  if (value < 60) return Number(value.toPrecision(3)) + " s";
  if (value < 3600) return Math.floor(value / 60) + " min " + Math.round(value % 60) + " s";
  return Math.floor(value / 3600) + " h " + Math.round((value % 3600) / 60) + " min";
}

function ticks(low, high, wanted, isLog) {
  if (isLog) {
    const out = [];
    const [from, to] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
    const factors = to - from > 4 ? [1] : to - from > 1 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
    for (let power = from; power <= to; power++)
      for (const factor of factors) {
        const value = factor * 10 ** power;
        if (value >= low * (1 - 1e-9) && value <= high * (1 + 1e-9)) out.push(value);
      }
    if (out.length >= 2) {
      const stride = Math.ceil(out.length / (wanted * 1.6));
      return out.filter((_, i) => i % stride === 0);
    }
  }
  const raw = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((f) => f * power).find((s) => s >= raw);
  const out = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) out.push(Number(value.toPrecision(12)));
  return out;
}

// Returns the y of a curve at x by linear interpolation, null outside of the curve.
function valueAt(points, x) {
  if (!points.length || x < points[0][0] || x > points[points.length - 1][0]) return null;
  let [low, high] = [0, points.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= x) low = middle;
    else high = middle;
  }
  const [a, b] = [points[low], points[high]];
  return b[0] === a[0] ? a[1] : a[1] + ((x - a[0]) / (b[0] - a[0])) * (b[1] - a[1]);
}

function extent(values) {
  return values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
}

// series: [{name, color, points: [[x, y]], band: [[x, low, high]], marks, dash, faint, silent}]; options: {height, xLabel,
// yLabel, logX, logY, formatX, formatY, late, line: {y, text}, legend}. `late` fits the y axis to the points after the first tenth of the x axis.
function chart(host, series, options) {
  const state = { hidden: new Set(), zoom: null };
  const view = el("div", { class: "chart" });
  const legend = el("div", { class: "legend" });
  host.replaceChildren(view, legend);
  const draw = () => drawChart(view, series, options, state, draw);
  if (series.length > 1 && options.legend !== false)
    for (const s of series.filter((s) => !s.silent)) {
      const button = el("button", { type: "button", title: "click to hide or show, double-click to show only this" },
        el("span", { class: "dot", style: `background:${s.color}` }), s.name);
      const sync = () => [...legend.children].forEach((b) => b.classList.toggle("off", state.hidden.has(b.dataset.name)));
      button.dataset.name = s.name;
      button.addEventListener("click", () => { state.hidden.has(s.name) ? state.hidden.delete(s.name) : state.hidden.add(s.name); sync(); draw(); });
      button.addEventListener("dblclick", () => { state.hidden = new Set(series.map((o) => o.name).filter((n) => n !== s.name)); sync(); draw(); });
      legend.append(button);
    }
  draw();
  new ResizeObserver(() => { if (view.clientWidth !== state.width) draw(); }).observe(view);
}

function ranges(visible, options, state) {
  const xs = extent(visible.flatMap((s) => s.points.map((p) => p[0])));
  const room = visible.some((s) => s.marks) ? 0.03 : 0; // keep marks at the edge inside the plot
  const wider = options.logX ? [xs[0] * (xs[0] / xs[1]) ** room, xs[1] * (xs[1] / xs[0]) ** room]
    : [xs[0] - room * (xs[1] - xs[0]), xs[1] + room * (xs[1] - xs[0])];
  const [x0, x1] = state.zoom || (xs[0] === xs[1] ? [xs[0] * 0.9, xs[1] * 1.1 || 1] : wider);
  let shown = visible.flatMap((s) => s.points.filter((p) => p[0] >= x0 && p[0] <= x1));
  if (options.late && !state.zoom) {
    const tail = shown.filter((p) => p[0] >= x0 + 0.1 * (x1 - x0));
    if (tail.length > 1) shown = tail;
  }
  let [y0, y1] = extent([...shown.map((p) => p[1]), ...(options.line && !state.zoom ? [options.line.y] : [])]);
  if (!Number.isFinite(y0)) [y0, y1] = [0, 1];
  const margin = options.logY ? 0 : (y1 - y0) * 0.06 || Math.abs(y0) * 0.05 || 1;
  return options.logY ? { x0, x1, y0: y0 * 0.985, y1: y1 * 1.015 } : { x0, x1, y0: y0 - margin, y1: y1 + margin };
}

function drawChart(view, series, options, state, redraw) {
  const width = (state.width = view.clientWidth) || 600;
  const height = options.height || 360;
  const [left, right, top, bottom] = [62, 14, 10, 42];
  const visible = series.filter((s) => !state.hidden.has(s.name)).map((s) => ({
    ...s, points: s.points.filter((p) => (!options.logX || p[0] > 0) && (!options.logY || p[1] > 0)) })).filter((s) => s.points.length);
  view.replaceChildren();
  const svg = shape(view, "svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": options.yLabel + " against " + options.xLabel });
  if (!visible.length) { shape(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no data"); return; }
  const { x0, x1, y0, y1 } = ranges(visible, options, state);
  const scale = (low, high, from, to, isLog) => isLog
    ? (v) => from + (Math.log(v / low) / Math.log(high / low)) * (to - from)
    : (v) => from + ((v - low) / (high - low)) * (to - from);
  const X = scale(x0, x1, left, width - right, options.logX);
  const Y = scale(y0, y1, height - bottom, top, options.logY);
  const [fx, fy] = [options.formatX || compact, options.formatY || compact];
  for (const value of ticks(y0, y1, height / 55, options.logY)) {
    shape(svg, "line", { class: "grid", x1: left, x2: width - right, y1: Y(value), y2: Y(value) });
    shape(svg, "text", { x: left - 8, y: Y(value) + 4, "text-anchor": "end" }, fy(value));
  }
  for (const value of ticks(x0, x1, width / 110, options.logX)) {
    shape(svg, "line", { class: "axis", x1: X(value), x2: X(value), y1: height - bottom, y2: height - bottom + 5 });
    shape(svg, "text", { x: X(value), y: height - bottom + 18, "text-anchor": "middle" }, fx(value));
  }
  shape(svg, "line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom });
  shape(svg, "text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, options.xLabel);
  shape(svg, "text", { x: -(top + height - bottom) / 2, y: 13, transform: "rotate(-90)", "text-anchor": "middle" }, options.yLabel);
  const id = "clip" + Math.random().toString(36).slice(2);
  shape(shape(svg, "clipPath", { id }), "rect", { x: left, y: top - 4, width: width - left - right, height: height - top - bottom + 4 });
  const inside = shape(svg, "g", { "clip-path": `url(#${id})` });
  if (options.line) {
    shape(inside, "line", { class: "cross", x1: left, x2: width - right, y1: Y(options.line.y), y2: Y(options.line.y) });
  }
  for (const s of visible) drawSeries(inside, s, X, Y, options);
  if (options.line) shape(svg, "text", { class: "note", x: left + 6, y: Y(options.line.y) - 5 }, options.line.text);
  pointer(view, svg, visible, { x0, x1, left, right: width - right, top, bottom: height - bottom, X, Y, fx, fy, width }, options, state, redraw);
}

function drawSeries(parent, s, X, Y, options) {
  const path = (points) => "M" + points.map((p) => X(p[0]).toFixed(1) + "," + Y(p[1]).toFixed(1)).join("L");
  const band = (s.band || []).filter((b) => !options.logX || b[0] > 0);
  if (band.length > 1) {
    const ring = [...band.map((b) => [b[0], b[2]]), ...band.map((b) => [b[0], b[1]]).reverse()];
    shape(parent, "path", { d: path(ring) + "Z", fill: s.color, opacity: 0.16 });
  }
  if (s.marks !== "only")
    shape(parent, "path", { d: path(s.points), fill: "none", stroke: s.color, "stroke-width": s.faint ? 1.1 : 2, "stroke-linejoin": "round",
      opacity: s.faint ? 0.55 : 1, ...(s.dash ? { "stroke-dasharray": "5 4" } : {}) });
  if (s.marks || s.points.length === 1)
    for (const p of s.points) shape(parent, "circle", { cx: X(p[0]), cy: Y(p[1]), r: s.points.length > 40 ? 2 : 3.6, fill: s.color });
}

function pointer(view, svg, visible, frame, options, state, redraw) {
  const tip = el("div", { class: "tip", hidden: "" });
  view.append(tip);
  const cross = shape(svg, "line", { class: "cross", y1: frame.top, y2: frame.bottom, visibility: "hidden" });
  const box = shape(svg, "rect", { y: frame.top, height: frame.bottom - frame.top, fill: "var(--c0)", opacity: 0.12, visibility: "hidden" });
  const where = (event) => Math.min(frame.right, Math.max(frame.left, event.clientX - svg.getBoundingClientRect().left));
  const invert = (px) => {
    const share = (px - frame.left) / (frame.right - frame.left);
    return options.logX ? frame.x0 * (frame.x1 / frame.x0) ** share : frame.x0 + share * (frame.x1 - frame.x0);
  };
  let from = null;
  const leave = () => { tip.hidden = true; cross.setAttribute("visibility", "hidden"); };
  svg.addEventListener("pointermove", (event) => {
    const px = where(event);
    if (from !== null) {
      for (const [key, value] of [["x", Math.min(from, px)], ["width", Math.abs(px - from)], ["visibility", "visible"]]) box.setAttribute(key, value);
      return;
    }
    const x = invert(px);
    const rows = visible.map((s) => [s, s.marks === "only" ? null : valueAt(s.points, x)]).filter(([s, y]) => y !== null && !s.silent).sort((a, b) => a[1] - b[1]);
    if (!rows.length) return leave();
    cross.setAttribute("x1", px); cross.setAttribute("x2", px); cross.setAttribute("visibility", "visible");
    tip.replaceChildren(el("div", {}, el("b", {}, frame.fx(x))), ...rows.slice(0, 12).map(([s, y]) =>
      el("div", {}, el("span", {}, el("span", { class: "dot", style: `background:${s.color}` }), s.name), el("b", {}, Number(y.toPrecision(5)) + ""))));
    if (rows.length > 12) tip.append(el("div", { class: "quiet" }, `and ${rows.length - 12} more`));
    tip.hidden = false;
    tip.style.top = "14px";
    tip.style.left = (px + 16 + tip.offsetWidth > frame.width ? px - tip.offsetWidth - 14 : px + 16) + "px";
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointerdown", (event) => { if (event.pointerType === "mouse") { from = where(event); svg.setPointerCapture(event.pointerId); leave(); } });
  svg.addEventListener("pointerup", (event) => {
    if (from === null) return;
    const ends = [from, where(event)].sort((a, b) => a - b);
    from = null;
    box.setAttribute("visibility", "hidden");
    if (ends[1] - ends[0] > 8) { state.zoom = ends.map(invert); redraw(); }
  });
  svg.addEventListener("dblclick", () => { state.zoom = null; redraw(); });
}
