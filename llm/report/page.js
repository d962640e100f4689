"use strict";
// Draws the sections of the page from the data of the report. A section without data stays empty and is hidden.

const DATA = JSON.parse(document.getElementById("data").textContent);
const remembered = (() => { try { return JSON.parse(sessionStorage.getItem("crucible") || "{}"); } catch { return {}; } })();
const remember = (key, value) => { remembered[key] = value; try { sessionStorage.setItem("crucible", JSON.stringify(remembered)); } catch { /* private windows have no storage */ } };
const color = (index) => `var(--c${((index % 10) + 10) % 10})`;
const place = (id) => document.getElementById(id);
const fixed = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const signed = (value) => (value > 0 ? "+" : "−") + fixed(Math.abs(value), 4);
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

function head(title, ...tools) {
  return el("div", { class: "top" }, el("h2", {}, title), el("div", { class: "tools" }, ...tools));
}

function choice(key, options, initial, redraw) {
  const valid = options.some(([value]) => value === remembered[key]);
  const state = { value: valid ? remembered[key] : initial };
  const box = el("span", { class: "switch" });
  for (const [value, label] of options) {
    const button = el("button", { type: "button", class: value === state.value ? "on" : "", "data-choice": value }, label);
    button.addEventListener("click", () => {
      state.value = value;
      remember(key, value);
      [...box.children].forEach((b) => b.classList.toggle("on", b === button));
      redraw();
    });
    box.append(button);
  }
  return [box, state];
}

function header() {
  place("title").textContent = DATA.title;
  document.title = DATA.title + " – Crucible report";
  const counts = {};
  for (const state of DATA.states) counts[state] = (counts[state] || 0) + 1;
  place("states").replaceChildren(...Object.entries(counts).flatMap(([state, n]) => [el("span", { class: "chip " + state }, `${n} ${state}`), " "]));
  const root = document.documentElement;
  const wanted = new URLSearchParams(location.search).get("theme") || remembered.theme;
  root.classList.toggle("dark", wanted ? wanted === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  place("theme").addEventListener("click", () => remember("theme", root.classList.toggle("dark") ? "dark" : "light"));
  place("made").textContent = `Generated from run folders by python -m llm.report, ${DATA.made}.`;
  place("headline").textContent = headline();
  place("subline").textContent = subline();
}

function headline() {
  const [first, second] = DATA.rows.filter((row) => row.rank !== null);
  if (!first) return "No run has finished yet.";
  const rate = first.lr === null || first.group.startsWith("lr=") ? "" : ` at lr ${compact(first.lr)}`;
  if (!second) return `${first.group}${rate}: loss ${fixed(first.loss, 4)}.`;
  const pair = between(first.group, second.group);
  const gap = fixed(Math.abs(second.loss - first.loss), 4);
  const words = { better: `${first.group} is best${rate}: its loss is ${gap} nats per token below that of ${second.group}.`,
    "no difference seen": `${first.group}${rate} is first by ${gap} nats per token, a difference that is not significant.`,
    "one seed, no claim": `${first.group}${rate} is first by ${gap} nats per token. One seed per setting allows no claim.`,
    "seeds pruned, no claim": `${first.group}${rate} is first by ${gap} nats per token. Seeds were pruned, which allows no claim.` };
  return words[pair && pair.word] || `${first.group}${rate} is first by ${gap} nats per token.`;
}

function subline() {
  const tokens = Math.max(0, ...DATA.runs.map((run) => run.figures.tokens_seen || 0));
  const parts = [plural(DATA.states.length, "run"), plural(DATA.rows.length, "setting"), `up to ${compact(tokens)} tokens each`];
  const [first, second] = DATA.rows.filter((row) => row.rank !== null);
  const pair = second && between(first.group, second.group);
  if (pair && pair.p !== null) parts.push(`first against second: p = ${compact(pair.p)}, Welch's test on ${pair.counts.join(" and ")} seeds`);
  return parts.join(" · ");
}

function between(first, second) {
  const found = DATA.pairs.find((p) => (p.first === first && p.second === second) || (p.first === second && p.second === first));
  if (!found || found.first === first) return found;
  const word = { better: "worse", worse: "better" }[found.word] || found.word;
  return { ...found, first, second, word, difference: -found.difference, low: found.high === null ? null : -found.high, high: found.low === null ? null : -found.low, counts: [...found.counts].reverse() };
}

function xsOf(run, curve, axis) {
  return axis === "tokens" ? curve.tokens : axis === "seconds" ? curve.seconds : curve.tokens.map((t) => t * run.flops_per_token);
}

// Returns the finished runs at a group's best learning rate, or the unfinished ones where none has finished.
function seedsOf(index) {
  const runs = DATA.runs.filter((run) => run.group === index && run.is_best);
  const finished = runs.filter((run) => run.state === "finished");
  return finished.length ? finished : runs;
}

// Returns the mean curve over seeds, where all of them have a value, and the range between the lowest and the highest.
function meanCurve(runs, kind, axis) {
  const curves = runs.filter((run) => run[kind].loss.length).map((run) => xsOf(run, run[kind], axis).map((x, i) => [x, run[kind].loss[i]]));
  if (!curves.length) return null;
  const grid = curves[0].map((p) => p[0]);
  const rows = grid.map((x) => [x, curves.map((c) => valueAt(c, x)).filter((y) => y !== null)]).filter(([, ys]) => ys.length === curves.length);
  const points = rows.map(([x, ys]) => [x, ys.reduce((a, b) => a + b) / ys.length]);
  return { points, band: curves.length > 1 ? rows.map(([x, ys]) => [x, ...extent(ys)]) : [] };
}

function curves() {
  const host = el("div");
  const draw = () => {
    const [axis, kind, what] = [axisState.value, kindState.value, whatState.value];
    const series = what === "best"
      ? DATA.groups.map((group, index) => ({ name: group.label, color: color(index), ...meanCurve(seedsOf(index), kind, axis) })).filter((s) => s.points)
      : DATA.runs.filter((run) => run[kind].loss.length).map((run) => ({ name: run.name, color: color(run.group ?? 0), faint: !run.is_best,
          points: xsOf(run, run[kind], axis).map((x, i) => [x, run[kind].loss[i]]) }));
    const labels = { tokens: "tokens", seconds: "seconds of training, without validation", flops: "training FLOPs" };
    chart(host, series, { height: 400, xLabel: labels[axis], yLabel: (kind === "val" ? "validation" : "training") + " loss, nats per token", late: true,
      logX: scaleState.value.includes("x"), logY: scaleState.value.includes("y"), formatX: axis === "seconds" ? seconds : compact,
      line: DATA.target === null ? null : { y: DATA.target, text: `target loss ${DATA.target.toFixed(3)}` } });
  };
  const [axisBox, axisState] = choice("axis", [["tokens", "tokens"], ["seconds", "seconds"], ["flops", "FLOPs"]], "tokens", () => draw());
  const [kindBox, kindState] = choice("kind", [["val", "validation"], ["train", "training"]], "val", () => draw());
  const [whatBox, whatState] = choice("what", [["best", "best lr, mean of seeds"], ["all", "all runs"]], "best", () => draw());
  const [scaleBox, scaleState] = choice("scale", [["", "linear"], ["x", "log x"], ["y", "log y"], ["xy", "log both"]], "", () => draw());
  place("curves").append(head("Loss", whatBox, kindBox, axisBox, scaleBox), host);
  draw();
}

function table(columns, rows, initial) {
  const body = el("tbody");
  const headers = columns.map((column, index) => el("th", { class: column.text ? "text" : null, scope: "col" },
    el("button", { type: "button", onclick: () => sort(index) }, column.name)));
  let [at, isDown] = [initial ?? -1, false];
  const sort = (index) => { isDown = at === index ? !isDown : false; at = index; fill(); };
  const fill = () => {
    const key = at < 0 ? null : columns[at].value;
    const sorted = key === null ? rows : [...rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      const [noX, noY] = [x === null || x === undefined, y === null || y === undefined];
      if (noX || noY) return noX - noY; // unknown values stay at the end
      return (typeof x === "string" ? x.localeCompare(y, undefined, { numeric: true }) : x - y) * (isDown ? -1 : 1);
    });
    headers.forEach((th, i) => (i === at ? th.setAttribute("aria-sort", isDown ? "descending" : "ascending") : th.removeAttribute("aria-sort")));
    body.replaceChildren(...sorted.map((row) => el("tr", {}, ...columns.map((column) => {
      const cell = el("td", { class: [column.text && "text", column.wrap && "wrap"].filter(Boolean).join(" ") || null });
      cell.append(column.show ? column.show(row) : compact(column.value(row)));
      return cell;
    }))));
  };
  fill();
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...headers)), body));
}

function board() {
  const losses = DATA.rows.map((row) => row.loss).filter((loss) => loss !== null);
  const [low, high] = extent(losses);
  const bar = (row, index) => {
    if (row.loss === null) return "";
    const share = high > low ? 0.12 + (0.88 * (row.loss - low)) / (high - low) : 1;
    return el("span", { class: "bar" }, el("i", { style: `width:${(100 * share).toFixed(0)}%;background:${color(index)}` }));
  };
  const goal = DATA.target === null ? "" : ` to ${DATA.target.toFixed(3)}`;
  const rows = DATA.rows.map((row, index) => ({ ...row, index }));
  const reached = (row, value, form) => (value === null ? (row.loss === null ? "–" : el("span", { class: "quiet" }, "not reached")) : form(value));
  place("board").append(head("Leaderboard", el("span", { class: "quiet" }, "each setting at its best learning rate; ± standard error over seeds")), table([
    { name: "#", value: (r) => r.rank, show: (r) => r.rank ?? "–" },
    { name: "setting", text: true, value: (r) => r.group, show: (r) => el("span", {}, el("span", { class: "dot", style: `background:${color(r.index)}` }), r.group) },
    { name: "best\u00a0lr", value: (r) => r.lr },
    { name: "loss", value: (r) => r.loss, show: (r) => el("span", {}, el("b", {}, (r.is_bound ? "≤ " : "") + fixed(r.loss, 4)), r.standard_error === null ? "" : ` ± ${fixed(r.standard_error, 4)}`, bar(r, r.index)) },
    { name: "seeds", value: (r) => r.seeds },
    { name: "bits/byte", value: (r) => r.bits_per_byte, show: (r) => fixed(r.bits_per_byte, 4) },
    { name: "tokens" + goal, value: (r) => r.tokens_to_loss, show: (r) => reached(r, r.tokens_to_loss, compact) },
    { name: "time" + goal, value: (r) => r.seconds_to_loss, show: (r) => reached(r, r.seconds_to_loss, seconds) },
    { name: "tokens/s", value: (r) => r.tokens_per_second },
    { name: "MFU", value: (r) => r.mfu, show: (r) => (r.mfu === null ? "–" : (100 * r.mfu).toFixed(1) + " %") },
    { name: "optimizer state, bytes", value: (r) => r.optimizer_state_bytes },
    ...(new Set(DATA.rows.map((row) => row.parameters)).size > 1 ? [{ name: "parameters", value: (r) => r.parameters }] : []),
    { name: "finished runs", value: (r) => r.finished / r.runs, show: (r) => `${r.finished}/${r.runs}` + (r.pruned ? `, ${r.pruned} pruned` : "") },
  ], rows, 0));
}

function rates() {
  const pointsOf = (group) => group.rates.filter((r) => r.mean !== null && r.lr !== null).map((r) => [r.lr, r.mean]);
  const isByRate = DATA.groups.every((group) => Object.keys(group.settings).join() === "optimizer.lr"); // one series with one point per group
  const series = isByRate ? [{ name: "mean of seeds", color: color(0), marks: true, points: DATA.groups.flatMap(pointsOf).sort((a, b) => a[0] - b[0]) }].filter((s) => s.points.length > 1)
    : DATA.groups.map((group, index) => ({ name: group.label, color: color(index), marks: true, points: pointsOf(group) })).filter((s) => s.points.length > 1);
  if (!series.length) return;
  const host = el("div");
  place("rates").append(head("Loss against learning rate"), host);
  const [low, high] = extent(series.flatMap((s) => s.points.map((p) => p[1])));
  chart(host, series, { height: 300, logX: true, logY: high / low > 3, xLabel: "learning rate", yLabel: "final validation loss" });
}

function versus() {
  if (!DATA.pairs.length) return;
  const names = DATA.groups.map((group) => group.label).filter((name) => DATA.pairs.some((p) => p.first === name || p.second === name)).slice(0, 14);
  const cell = (first, second) => {
    const pair = between(first, second);
    if (!pair) return el("td", { class: "quiet" }, "·");
    if (pair.difference === null) return el("td", { class: "quiet" }, "diverged");
    const title = pair.low === null ? `seeds ${pair.counts.join(" and ")}` : `95 % interval ${fixed(pair.low, 4)} to ${fixed(pair.high, 4)}, p = ${compact(pair.p)} (Holm), ${pair.counts.join(" and ")} seeds`;
    return el("td", { title }, el("span", { class: "chip " + pair.word }, signed(pair.difference)),
      el("div", { class: "quiet", style: "font-size:11.5px" }, pair.p === null ? pair.word : pair.word === "no difference seen" ? `p = ${compact(pair.p)}, not significant` : `p = ${compact(pair.p)}`));
  };
  const isLong = names.join("").length > 60;
  const header = el("tr", {}, el("th", { class: "text" }, "setting"), ...names.slice(1).map((name, j) => el("th", { title: name }, isLong ? `#${j + 2}` : name)));
  const rows = names.slice(0, -1).map((first, i) => el("tr", {}, el("td", { class: "text" }, el("span", { class: "dot", style: `background:${color(i)}` }), isLong ? `#${i + 1} ${first}` : first),
    ...names.slice(1).map((second, j) => (j < i ? el("td", {}) : cell(first, second)))));
  place("versus").append(head("Significance of differences", el("span", { class: "quiet" }, "Welch's test with Holm's correction for the number of pairs; row minus column")),
    el("div", { class: "scroll" }, el("table", {}, el("thead", {}, header), el("tbody", {}, ...rows))));
}

function paste(line) {
  const text = "python train.py " + line;
  const button = el("button", { type: "button", onclick: async () => { await navigator.clipboard.writeText(text); button.textContent = "copied"; setTimeout(() => (button.textContent = "copy"), 1200); } }, "copy");
  return el("div", { class: "paste" }, el("code", {}, text), button);
}

function fits() {
  const best = DATA.rows.findIndex((row) => row.rank === 1);
  if (best < 0 && !DATA.fits.length) return;
  place("fits").append(head("Suggested runs"));
  if (best >= 0 && DATA.groups[best].overrides) place("fits").append(el("p", { class: "quiet", style: "margin:0" }, "The best setting so far"), paste(DATA.groups[best].overrides));
  DATA.fits.forEach((fit, index) => {
    const [plot, side, law] = [el("div"), el("div"), fit.law];
    const interval = law.low === null ? "" : ` (95 %: ${fixed(law.low, 3)} to ${fixed(law.high, 3)})`;
    side.append(el("h2", {}, fit.name + ", " + fit.subject), el("p", {}, `${fit.y_name} = ${compact(law.coefficient)} · ${fit.x_name}`, el("sup", {}, fixed(law.exponent, 3)), interval + `, ${law.points} points`));
    if (fit.caution) side.append(el("p", { class: "caution" }, fit.caution));
    side.append(...fit.overrides.map(paste));
    place("fits").append(el("div", { class: "fit" }, plot, side));
    const xs = extent(fit.points.map((p) => p[0]));
    const line = Array.from({ length: 24 }, (_, i) => xs[0] * (2 * xs[1] / xs[0]) ** (i / 23)).map((x) => [x, law.coefficient * x ** law.exponent]);
    chart(plot, [{ name: "fit", color: "var(--quiet)", points: line, dash: true }, { name: "measured", color: color(index), points: fit.points, marks: "only", silent: true }],
      { height: 230, logX: true, logY: true, xLabel: fit.x_name, yLabel: fit.y_name, legend: false });
  });
}

function useful() {
  if (!DATA.useful.length) return;
  place("useful").append(head("Useful batch", el("span", { class: "quiet" }, "(S/S_min − 1)(E/E_min − 1) = 1, S updates and E tokens to the same loss")));
  DATA.useful.forEach((found, index) => {
    const told = found.lines.map((line, i) => el("p", { class: i && line.trim() === found.caution ? "caution" : i ? "quiet" : null, style: "margin:3px 0" }, line.trim()));
    if (!found.trade) return place("useful").append(...told);
    const plot = el("div");
    place("useful").append(el("div", { class: "fit" }, plot, el("div", {}, ...told)));
    const [low, high] = extent(found.batches);
    const line = Array.from({ length: 24 }, (_, i) => 2 * high * (low / high / 4) ** (i / 23))
      .map((batch) => [found.trade.min_updates * (1 + found.tokens / batch), found.trade.min_tokens * (1 + batch / found.tokens)]);
    chart(plot, [{ name: "fit", color: "var(--quiet)", points: line, dash: true }, { name: "measured", color: color(index), points: [...found.points].sort((a, b) => a[0] - b[0]), marks: "only", silent: true }],
      { height: 230, logX: true, logY: true, xLabel: "updates", yLabel: "tokens", legend: false });
  });
}

function heat(layer) {
  const canvas = el("canvas", { width: layer.steps.length, height: layer.load.length });
  const pixels = canvas.getContext("2d");
  const mix = (a, b, share) => a.map((v, i) => Math.round(v + (b[i] - v) * share));
  layer.load.forEach((row, expert) => row.forEach((load, time) => {
    const tone = load < 1 ? mix([59, 111, 181], [242, 242, 240], load) : mix([242, 242, 240], [194, 69, 58], Math.min(1, load - 1));
    pixels.fillStyle = `rgb(${tone.join(",")})`;
    pixels.fillRect(time, layer.load.length - 1 - expert, 1, 1);
  }));
  const last = layer.load.map((row) => row[row.length - 1]);
  return el("figure", { style: "margin:0" }, canvas, el("figcaption", { class: "quiet" }, `${layer.layer}: at step ${layer.steps[layer.steps.length - 1]} the loads of ${last.length} experts lie between ${fixed(Math.min(...last), 2)} and ${fixed(Math.max(...last), 2)} of an even share`));
}

function experts() {
  const runs = DATA.runs.filter((run) => run.expert_load.length);
  if (!runs.length) return;
  const grid = el("div", { class: "heat" });
  const select = el("select", { "aria-label": "run", onchange: () => draw() }, ...runs.map((run, i) => el("option", { value: i }, run.name)));
  const draw = () => grid.replaceChildren(...runs[select.value].expert_load.map(heat));
  place("experts").append(head("Expert load", el("span", { class: "quiet" }, "no tokens", el("span", { class: "scale" }), "twice an even share"), select), grid);
  draw();
}

function codebooks() {
  const runs = DATA.runs.filter((run) => run.codebook.length);
  if (!runs.length) return;
  const host = el("div");
  const select = el("select", { "aria-label": "run", onchange: () => draw() }, ...runs.map((run, i) => el("option", { value: i }, run.name)));
  const draw = () => chart(host, runs[select.value].codebook.map((c, i) => ({ name: c.layer, color: color(i), points: c.tokens.map((t, j) => [t, 100 * c.usage[j]]) })),
    { height: 280, xLabel: "tokens", yLabel: "codes in use, %" });
  place("codebooks").append(head("Codebook usage", select), host);
  draw();
}

function extrapolation() {
  const runs = DATA.runs.filter((run) => run.extrapolation.length);
  if (!runs.length) return;
  const host = el("div");
  place("extrapolation").append(head("Loss at longer contexts"), host);
  chart(host, runs.map((run, i) => ({ name: run.name, color: color(run.group ?? i), marks: true, points: run.extrapolation })),
    { height: 280, logX: true, xLabel: "context length", yLabel: "validation loss" });
}

function difference() {
  const runs = DATA.runs.filter((run) => run.has_config);
  if (runs.length < 2) return;
  const pick = (index) => { const s = el("select", { "aria-label": "run", onchange: () => draw() }, ...runs.map((run, i) => el("option", { value: i }, run.name))); s.value = index; return s; };
  const leader = (place) => runs.findIndex((run) => run.is_best && run.group === place); // initially the two best settings
  const [first, second, host] = [pick(Math.max(0, leader(0))), pick(leader(1) < 0 ? runs.length - 1 : leader(1)), el("div")];
  const draw = () => {
    const [a, b] = [runs[first.value].config, runs[second.value].config];
    const keys = [...new Set([...Object.keys(a), ...Object.keys(b)])].filter((key) => a[key] !== b[key]).sort();
    host.replaceChildren(keys.length ? table([{ name: "key", text: true, value: (k) => k, show: (k) => el("code", {}, k) },
      { name: runs[first.value].name, text: true, wrap: true, value: (k) => a[k] ?? null, show: (k) => a[k] ?? "–" },
      { name: runs[second.value].name, text: true, wrap: true, value: (k) => b[k] ?? null, show: (k) => b[k] ?? "–" }], keys) : el("p", { class: "quiet" }, "The configurations are equal."));
  };
  place("difference").append(head("Configuration differences", first, "and", second), host);
  draw();
}

function runTable() {
  place("runs").append(head("All runs"), table([
    { name: "run", text: true, value: (r) => r.name, show: (r) => el("span", { title: r.folder }, el("span", { class: "dot", style: `background:${color(r.group ?? -1)}` }), r.name) },
    { name: "state", text: true, value: (r) => r.state, show: (r) => el("span", { class: "chip " + r.state }, r.state === "running" ? `running, ${(100 * r.progress).toFixed(0)} %` : r.state) },
    { name: "lr", value: (r) => r.lr }, { name: "seed", value: (r) => r.seed, show: (r) => r.seed ?? "–" },
    { name: "loss", value: (r) => r.loss, show: (r) => fixed(r.loss, 4) },
    { name: "tokens", value: (r) => r.figures.tokens_seen ?? null }, { name: "time", value: (r) => r.figures.seconds ?? null, show: (r) => seconds(r.figures.seconds ?? null) },
    { name: "tokens/s", value: (r) => r.figures.tokens_per_second ?? null },
    { name: "peak memory, bytes", value: (r) => r.figures.peak_memory_bytes ?? null },
    { name: "reason", text: true, wrap: true, value: (r) => r.reason || null, show: (r) => r.reason || "" },
  ], DATA.runs));
}

for (const section of [header, curves, board, rates, versus, fits, useful, experts, codebooks, extrapolation, difference, runTable]) section();
if (DATA.refresh_seconds && DATA.is_open) {
  setTimeout(() => { remember("scroll", scrollY); location.reload(); }, 1000 * DATA.refresh_seconds);
  scrollTo(0, remembered.scroll || 0);
}
