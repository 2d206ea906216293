"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const settings = data.rows.map(row => row.setting);
const rowOf = Object.fromEntries(data.rows.map(row => [row.setting, row]));
const palette = ["#e69f00", "#56b4e9", "#009e73", "#d55e00", "#0072b2", "#cc79a7", "#b8a700"]; // Okabe-Ito, its yellow darkened
const dashes = ["", "7 4", "2 4", "9 3 2 3", "14 4", "5 2 1 2 1 2"]; // a second way to tell them apart
const colour = s => s === data.reference ? "var(--ink)" : palette[(others.indexOf(s)) % palette.length];
const dash = s => s === data.reference ? "" : dashes[others.indexOf(s) % dashes.length];
const others = settings.filter(s => s !== data.reference);
const $ = id => document.getElementById(id);
const state = { answer: "val_loss", hidden: new Set(), layout: "together", ap: "mAP", image: 0, seed: null, score: 0.3 };

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
function html(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const format = (value, digits = 4) => value.toFixed(digits).replace("-", "−");
const signed = (value, digits) => (value < 0 ? "" : "+") + format(value, digits);

function ticks(low, high, count) {
  if (high <= low) return [low];
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}
const tickText = (value, all) => {
  const step = all.length > 1 ? Math.abs(all[1] - all[0]) : 1;
  return format(value, Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9))));
};

// --- buttons -----------------------------------------------------------------------------------

function choices(group, options, isOn, onClick) {
  const box = document.querySelector(`[data-group="${group}"]`);
  box.replaceChildren(...options.map(([value, label, icon]) => {
    const button = html("button", { type: "button", "aria-pressed": isOn(value) }, ...(icon ? [icon] : []), label);
    button.onclick = () => {
      onClick(value);
      [...box.children].forEach((b, i) => b.setAttribute("aria-pressed", isOn(options[i][0])));
    };
    return button;
  }));
}

const tip = $("tip");
function showTip(event, ...lines) {
  tip.replaceChildren(...lines);
  tip.hidden = false;
  const fits = event.pageX + 14 + tip.offsetWidth < scrollX + document.documentElement.clientWidth - 8;
  tip.style.left = Math.max(scrollX + 8, fits ? event.pageX + 14 : event.pageX - 14 - tip.offsetWidth) + "px";
  tip.style.top = event.pageY + 16 + "px";
}
const hideTip = () => { tip.hidden = true; };

// --- the answer: paired differences --------------------------------------------------------------

function seedDifferences(setting, name) {
  const values = rowOf[setting].figures[name].values, reference = rowOf[data.reference]?.figures[name].values ?? {};
  return Object.keys(values).filter(seed => seed in reference).map(seed => values[seed] - reference[seed]);
}
function drawForest() {
  const box = $("forest"), name = state.answer, digits = data.figures[name].digits;
  $("answer-text").textContent = data.answers[name];
  const rows = others.map(setting => ({ setting, d: rowOf[setting].figures[name].difference, seeds: seedDifferences(setting, name) }));
  const ends = rows.flatMap(r => r.d ? [r.d.low ?? r.d.mean, r.d.high ?? r.d.mean, ...r.seeds] : []).concat(0);
  const width = Math.max(280, box.clientWidth), narrow = width < 640;
  const left = narrow ? 8 : Math.min(230, 24 + 7.4 * Math.max(...others.map(s => s.length), 8)), right = narrow ? 8 : 250;
  const step = narrow ? 54 : 36, height = rows.length * step + 34;
  let [low, high] = [Math.min(...ends), Math.max(...ends)];
  const pad = (high - low || 1) * .06; low -= pad; high += pad;
  const x = v => left + (v - low) / (high - low) * (width - left - right);
  const chart = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": data.answers[name] });
  const marks = ticks(low, high, narrow ? 4 : 6);
  for (const t of marks) chart.append(
    svg("line", { class: "grid", x1: x(t), x2: x(t), y1: 0, y2: height - 22 }),
    svg("text", { x: x(t), y: height - 6, "text-anchor": "middle" }, tickText(t, marks)));
  chart.append(svg("line", { class: "axis", x1: x(0), x2: x(0), y1: 0, y2: height - 22 }));
  rows.forEach(({ setting, d, seeds }, i) => {
    const y = i * step + (narrow ? 34 : 18), c = colour(setting), shown = d?.shown;
    const said = rowOf[setting].verdicts[name], text = d ? `${signed(d.mean, digits)}  ${said}` : said;
    chart.append(svg("text", { class: "name", x: narrow ? left : left - 12, y: narrow ? y - 14 : y + 4, "text-anchor": narrow ? "start" : "end" }, narrow && setting.length > 21 ? setting.slice(0, 20) + "…" : setting));
    chart.append(svg("text", { x: narrow ? width - 8 : width - right + 14, y: narrow ? y - 14 : y + 4, "text-anchor": narrow ? "end" : "start", style: shown ? "fill:var(--ink);font-weight:600" : "" }, text));
    if (!d) return;
    if (d.low !== null) chart.append(svg("line", { x1: x(d.low), x2: x(d.high), y1: y, y2: y, style: `stroke:${c}`, "stroke-width": 3, "stroke-linecap": "round" }));
    for (const s of seeds) chart.append(svg("line", { x1: x(s), x2: x(s), y1: y - 5, y2: y + 5, style: `stroke:${c}`, "stroke-width": 1.5 }));
    chart.append(svg("circle", { cx: x(d.mean), cy: y, r: 6, style: `stroke:${c};fill:${shown ? c : "var(--card)"}`, "stroke-width": 2.5 }));
  });
  box.replaceChildren(chart);
  if (rows.some(r => r.d?.shown && !r.d.shown_jointly)) box.append(html("p", { class: "hint" }, "* no longer shown by the wider interval that counts all comparisons (Bonferroni)"));
}

// --- curves --------------------------------------------------------------------------------------

function curve(setting, name) {
  const byEpoch = new Map();
  for (const epochs of Object.values(data.curves[setting] ?? {}))
    for (const e of epochs) if (e[name] !== null) byEpoch.set(e.epoch, [...(byEpoch.get(e.epoch) ?? []), e[name]]);
  return [...byEpoch].sort((a, b) => a[0] - b[0]).map(([epoch, values]) => ({
    epoch: epoch + 1, mean: values.reduce((a, b) => a + b) / values.length, low: Math.min(...values), high: Math.max(...values) }));
}

function lineChart(title, lines, domain) {
  const box = html("div", {}, html("h3", {}, title));
  const width = 380, height = 240, left = 46, bottom = 34, top = 8, right = 8;
  const points = lines.flatMap(l => l.points);
  if (!points.length) { box.append(html("p", { class: "hint" }, "not measured")); return box; }
  const [xl, xh] = [Math.min(...points.map(p => p.epoch)), Math.max(...points.map(p => p.epoch))];
  let [low, high] = domain ?? range(points);
  const x = e => left + (xh > xl ? (e - xl) / (xh - xl) : .5) * (width - left - right);
  const y = v => top + (high - v) / (high - low) * (height - top - bottom);
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", role: "img", "aria-label": title });
  const marks = ticks(low, high, 5);
  for (const t of marks) chart.append(
    svg("line", { class: "grid", x1: left, x2: width - right, y1: y(t), y2: y(t) }),
    svg("text", { x: left - 6, y: y(t) + 4, "text-anchor": "end" }, tickText(t, marks)));
  const epochs = ticks(xl, xh, 6).filter(Number.isInteger);
  for (const e of epochs) chart.append(svg("text", { x: x(e), y: height - bottom + 16, "text-anchor": "middle" }, e));
  chart.append(svg("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, "epoch"));
  for (const { points, setting, stroke, dashed } of lines) {
    if (points.some(p => p.high > p.low)) chart.append(svg("path", { class: "faint", style: `fill:${stroke}`, d:
      "M" + points.map(p => `${x(p.epoch)},${y(p.high)}`).join("L") + "L" + [...points].reverse().map(p => `${x(p.epoch)},${y(p.low)}`).join("L") + "Z" }));
    const path = svg("path", { class: "line", style: `stroke:${stroke}`, "stroke-dasharray": dashed, d: "M" + points.map(p => `${x(p.epoch)},${y(p.mean)}`).join("L") });
    path.dataset.setting = setting;
    chart.append(path);
    if (points.length === 1) chart.append(svg("circle", { cx: x(points[0].epoch), cy: y(points[0].mean), r: 3, style: `fill:${stroke}` }));
  }
  const cross = svg("line", { class: "axis", y1: top, y2: height - bottom, visibility: "hidden" });
  chart.append(cross);
  chart.addEventListener("pointermove", event => {
    const at = chart.getBoundingClientRect(), px = (event.clientX - at.left) / at.width * width;
    const epoch = Math.max(xl, Math.min(xh, Math.round(xl + (px - left) / (width - left - right) * (xh - xl))));
    cross.setAttribute("x1", x(epoch)); cross.setAttribute("x2", x(epoch)); cross.setAttribute("visibility", "visible");
    const here = lines.map(l => [l, l.points.find(p => p.epoch === epoch)]).filter(([, p]) => p).sort((a, b) => b[1].mean - a[1].mean);
    if (here.length) showTip(event, html("b", {}, `epoch ${epoch}`), ...here.map(([l, p]) =>
      html("div", {}, html("span", {}, html("i", { class: "swatch", style: `background:${l.tipColour ?? l.stroke.replace("var(--ink)", "currentColor")}` }), l.label ?? l.setting), html("span", {}, format(p.mean)))));
  });
  chart.addEventListener("pointerleave", () => { hideTip(); cross.setAttribute("visibility", "hidden"); });
  box.append(chart);
  return box;
}
function range(points) {
  let low = Math.min(...points.map(p => p.low)), high = Math.max(...points.map(p => p.high));
  const pad = (high - low || Math.abs(high) || 1) * .05;
  return [low - pad, high + pad];
}

function drawCurves() {
  const visible = settings.filter(s => !state.hidden.has(s) && data.curves[s]);
  let charts;
  if (state.layout === "together") {
    charts = ["loss", "val_loss", state.ap].map(name => lineChart(name, visible.map(setting =>
      ({ setting, points: curve(setting, name), stroke: colour(setting), dashed: dash(setting) }))));
  } else { // one panel per setting, over the reference in grey, all on one scale
    const names = state.layout === "losses" ? ["val_loss", "loss"] : [state.ap];
    const lines = setting => names.map((name, i) => ({ setting, label: `${setting} ${name}`, points: curve(setting, name), stroke: colour(setting), dashed: i ? "3 4" : "" }));
    const grey = lines(data.reference).map(l => ({ ...l, stroke: "var(--soft)" }));
    const panels = visible.filter(s => s !== data.reference);
    const points = [...grey, ...panels.flatMap(lines)].flatMap(l => l.points);
    charts = panels.map(setting => lineChart(setting, [...grey, ...lines(setting)], points.length ? range(points) : undefined));
  }
  $("curve-charts").replaceChildren(...charts);
  $("curve-hint").textContent = "Line: mean over the seeds. Band: lowest to highest seed." + (state.layout === "together" ? ""
    : ` Grey: ${data.reference}.` + (state.layout === "losses" ? " Solid: val_loss, dotted: loss." : ""));
}
function highlight(setting) {
  for (const path of document.querySelectorAll("#curve-charts path.line")) {
    path.style.opacity = setting && path.dataset.setting !== setting ? .15 : 1;
    path.style.strokeWidth = setting && path.dataset.setting === setting ? 3.5 : "";
  }
}

// --- gap bars ------------------------------------------------------------------------------------

function drawGaps() {
  const box = $("gap-chart"), width = Math.max(280, box.clientWidth), narrow = width < 640;
  const rows = settings.filter(s => !state.hidden.has(s)).map(setting => ({ setting, best: rowOf[setting].figures.gap, last: rowOf[setting].figures.final_gap }));
  const all = rows.flatMap(r => [...Object.values(r.best.values), ...Object.values(r.last.values)]).concat(0);
  const low = Math.min(...all), high = Math.max(...all) + (Math.max(...all) - low || 1) * .04;
  const left = narrow ? 8 : Math.min(230, 24 + 7.4 * Math.max(...settings.map(s => s.length))), right = 70, step = narrow ? 58 : 42;
  const height = rows.length * step + 6, x = v => left + (v - low) / (high - low) * (width - left - right);
  const chart = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "gap between val_loss and loss per setting" });
  rows.forEach(({ setting, best, last }, i) => {
    const y = i * step + (narrow ? 20 : 4);
    chart.append(svg("text", { class: "name", x: narrow ? left : left - 12, y: narrow ? y - 5 : y + 21, "text-anchor": narrow ? "start" : "end" }, setting));
    [[best, 1, 0], [last, .4, 16]].forEach(([summary, opacity, down]) => {
      if (summary.mean === null) return;
      chart.append(svg("rect", { x: Math.min(x(0), x(summary.mean)), y: y + down, width: Math.abs(x(summary.mean) - x(0)), height: 13, rx: 2, style: `fill:${colour(setting)}`, opacity }));
      for (const v of Object.values(summary.values)) chart.append(svg("line", { x1: x(v), x2: x(v), y1: y + down - 1, y2: y + down + 14, style: "stroke:var(--soft)", "stroke-width": 1.5 }));
      chart.append(svg("text", { x: Math.max(x(0), ...Object.values(summary.values).map(x)) + 6, y: y + down + 11 }, signed(summary.mean, 3)));
    });
  });
  chart.append(svg("line", { class: "axis", x1: x(0), x2: x(0), y1: 0, y2: height }));
  box.replaceChildren(chart);
}

// --- pictures ------------------------------------------------------------------------------------

function iou([ax, ay, aw, ah], [bx, by, bw, bh]) {
  const w = Math.min(ax + aw, bx + bw) - Math.max(ax, bx), h = Math.min(ay + ah, by + bh) - Math.max(ay, by);
  return w <= 0 || h <= 0 ? 0 : w * h / (aw * ah + bw * bh - w * h);
}
function match(detections, truth) { // greedily, best score first, as COCO does
  const free = new Set(truth);
  const right = [], wrong = [];
  for (const d of [...detections].sort((a, b) => b.score - a.score)) {
    const hit = [...free].filter(t => t.category === d.category).map(t => [iou(t.bbox, d.bbox), t]).sort((a, b) => b[0] - a[0])[0];
    if (hit && hit[0] >= .5) { free.delete(hit[1]); right.push(d); } else wrong.push(d);
  }
  return { right, wrong, missed: [...free] };
}
function picture(image, groups) {
  const unit = Math.max(image.width, image.height) / 100;
  const view = svg("svg", { viewBox: `0 0 ${image.width} ${image.height}`, role: "img" });
  if (image.src) view.append(svg("image", { href: image.src, width: image.width, height: image.height, preserveAspectRatio: "none" }));
  for (const [boxes, stroke, dashed] of groups) for (const { bbox: [x, y, w, h], category, score } of boxes) {
    view.append(svg("rect", { x, y, width: w, height: h, fill: "none", style: "stroke:#000", opacity: dashed ? .2 : .45, "stroke-width": unit * 1.7 }));
    view.append(svg("rect", { x, y, width: w, height: h, fill: "none", style: `stroke:${stroke}`, "stroke-width": unit, "stroke-dasharray": dashed ? dashed.map(n => n * unit).join(" ") : "" }));
    const last = x > image.width * .7; // keep the words inside the picture
    const label = svg("text", { x: last ? Math.min(x + w, image.width) - unit : Math.max(x, 0) + unit, "text-anchor": last ? "end" : "start", y: Math.max(y, unit * 5.5) - unit, style: `font-size:${unit * 4.6}px;fill:#fff;stroke:#000;stroke-width:${unit * .9}px;paint-order:stroke;font-weight:600` }, category);
    if (score !== undefined) label.append(` ${score.toFixed(2)}`);
    view.append(label);
  }
  return view;
}
function drawPictures() {
  const image = data.images[state.image];
  if (!image) { $("pictures").hidden = true; return; }
  const card = (name, note, groups, swatch) => html("figure", {}, picture(image, groups), html("figcaption", {},
    ...(swatch ? [html("i", { class: "swatch", style: `background:${swatch}` })] : []), name, html("small", {}, note)));
  const truth = image.ground_truth;
  $("cards").replaceChildren(
    card("ground truth", `${truth.length} object${truth.length === 1 ? "" : "s"}`, [[truth, "#f0e442"]]),
    ...settings.map(setting => {
      const found = data.detections[setting]?.[state.seed]?.[image.id];
      if (!found) return card(setting, "no run with this seed", [], colour(setting));
      const { right, wrong, missed } = match(found.filter(d => d.score >= state.score), truth);
      return card(setting, `${right.length} of ${truth.length} found, ${wrong.length} wrong`,
        [[missed, "#cc79a7", [.8, 1.4]], [wrong, "#d55e00", [3, 1.6]], [right, "#009e73"]], colour(setting));
    }));
}

// --- the table -----------------------------------------------------------------------------------

function sortTable(header) {
  const table = header.closest("table"), column = header.cellIndex, body = table.tBodies[0];
  const ascending = header.ariaSort !== "ascending";
  for (const th of table.tHead.rows[0].cells) th.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const value = row => row.cells[column].dataset.value;
  const order = (a, b) => {
    const [p, q] = [value(a), value(b)];
    if (p === "" || q === "") return (p === "") - (q === ""); // no figure: last, either way
    const difference = column === 0 ? p.localeCompare(q) : p - q;
    return ascending ? difference : -difference;
  };
  body.append(...[...body.rows].sort(order));
}

// --- start ---------------------------------------------------------------------------------------

const scores = Object.values(data.detections).flatMap(Object.values).flatMap(Object.values).flat().map(d => d.score);
if (!scores.some(s => s >= state.score)) state.score = .05; // a young detector is sure of nothing
$("score").value = state.score;
$("score-shown").textContent = state.score.toFixed(2);
const seeds = [...new Set(Object.values(data.detections).flatMap(Object.keys))].sort((a, b) => a - b);
state.seed = seeds[0] ?? null;
if (!data.answers[state.answer]) state.answer = Object.keys(data.answers)[0];
for (const th of document.querySelectorAll("#table thead th")) th.querySelector("button").onclick = () => sortTable(th);
for (const dot of document.querySelectorAll("[data-swatch]")) dot.style.background = colour(dot.dataset.swatch);
choices("answer", Object.keys(data.answers).map(name => [name, data.figures[name].title]), v => v === state.answer, v => { state.answer = v; drawForest(); });
choices("settings", settings.filter(s => data.curves[s]).map(s => [s, s, svg("svg", { width: 26, height: 8 }, svg("line", { x1: 1, x2: 25, y1: 4, y2: 4, style: `stroke:${colour(s)}`, "stroke-width": 3, "stroke-dasharray": dash(s) }))]),
  s => !state.hidden.has(s), s => { state.hidden.has(s) ? state.hidden.delete(s) : state.hidden.add(s); drawCurves(); drawGaps(); });
for (const [i, button] of [...document.querySelector('[data-group="settings"]').children].entries()) {
  const setting = settings.filter(s => data.curves[s])[i];
  button.onmouseenter = button.onfocus = () => highlight(setting);
  button.onmouseleave = button.onblur = () => highlight(null);
}
choices("layout", [["together", "all together"], ["losses", "losses, each against none"], ["ap", "AP, each against none"]],
  v => v === state.layout, v => { state.layout = v; drawCurves(); });
choices("ap", ["mAP", "AP50", "AP75"].map(v => [v, v]), v => v === state.ap, v => { state.ap = v; drawCurves(); });
choices("seed", seeds.length > 1 ? seeds.map(s => [s, `seed ${s}`]) : [], v => v === state.seed, v => { state.seed = v; drawPictures(); });
const thumbs = document.querySelector(".thumbs");
thumbs.append(...data.images.map((image, i) => {
  const button = html("button", { type: "button", "aria-pressed": i === 0, "aria-label": `image ${image.id}` }, image.src ? html("img", { src: image.src, alt: "" }) : String(image.id));
  button.onclick = () => { state.image = i; [...thumbs.children].forEach((b, j) => b.setAttribute("aria-pressed", j === i)); drawPictures(); };
  return button;
}));
$("score").oninput = event => { state.score = +event.target.value; $("score-shown").textContent = state.score.toFixed(2); drawPictures(); };
$("theme").onclick = () => {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
};
function draw() { drawForest(); drawGaps(); }
drawCurves(); drawPictures(); draw();
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
