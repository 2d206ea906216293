// The training: a metric over the epochs.

function curve(setting, name) {
  const byEpoch = new Map(), scale = data.columns[name].scale;
  for (const metrics of Object.values(data.curves[setting] ?? {}))
    for (const [epoch, value] of metrics[name])
      byEpoch.set(epoch, [...(byEpoch.get(epoch) ?? []), value * scale]);
  return [...byEpoch].sort((a, b) => a[0] - b[0]).map(([epoch, values]) => (
    { epoch: epoch + 1, mean: mean(values), low: Math.min(...values), high: Math.max(...values) }));
}
function range(points) {
  const low = Math.min(...points.map(p => p.low)), high = Math.max(...points.map(p => p.high));
  const pad = (high - low || Math.abs(high) || 1) * .05;
  return [low - pad, high + pad];
}

/** Lines are { setting, label, points, stroke, dashed }. */
function lineChart(title, lines, domain) {
  const box = html("div", {}, html("h3", {}, title));
  const width = 380, height = 240, left = 46, bottom = 34, top = 8, right = 8;
  const points = lines.flatMap(l => l.points);
  if (!points.length) { box.append(html("p", { class: "hint" }, "not measured")); return box; }
  const epochs = points.map(p => p.epoch), first = Math.min(...epochs), last = Math.max(...epochs);
  const [low, high] = domain ?? range(points);
  const x = e => left + (last > first ? (e - first) / (last - first) : .5) * (width - left - right);
  const y = v => top + (high - v) / (high - low) * (height - top - bottom);
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", role: "img", "aria-label": title });
  const marks = ticks(low, high, 5);
  for (const t of marks) chart.append(
    svg("line", { class: "grid", x1: left, x2: width - right, y1: y(t), y2: y(t) }),
    svg("text", { x: left - 6, y: y(t) + 4, "text-anchor": "end" }, tickText(t, marks)));
  for (const e of ticks(first, last, 6).filter(Number.isInteger))
    chart.append(svg("text", { x: x(e), y: height - bottom + 16, "text-anchor": "middle" }, e));
  chart.append(svg("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, "epoch"));
  for (const line of lines) chart.append(...drawnLine(line, x, y));
  const cross = svg("line", { class: "axis", y1: top, y2: height - bottom, visibility: "hidden" });
  chart.append(cross);
  chart.addEventListener("pointermove", event => {
    const at = chart.getBoundingClientRect(), px = (event.clientX - at.left) / at.width * width;
    const raw = Math.round(first + (px - left) / (width - left - right) * (last - first));
    const epoch = Math.max(first, Math.min(last, raw));
    for (const end of ["x1", "x2"]) cross.setAttribute(end, x(epoch));
    cross.setAttribute("visibility", "visible");
    showValues(event, epoch, lines);
  });
  chart.addEventListener("pointerleave", () => { hideTip(); cross.setAttribute("visibility", "hidden"); });
  box.append(chart);
  return box;
}
function drawnLine({ points, setting, stroke, dashed }, x, y) {
  const nodes = [], fill = `fill:${stroke}`, at = (points, end) => points.map(p => `${x(p.epoch)},${y(p[end])}`);
  if (points.some(p => p.high > p.low)) {
    const outline = [...at(points, "high"), ...at(points, "low").reverse()].join("L");
    nodes.push(svg("path", { class: "faint", style: fill, d: `M${outline}Z` }));
  }
  const path = svg("path", { class: "line", style: `stroke:${stroke}`, "stroke-dasharray": dashed,
    d: points.length ? "M" + at(points, "mean").join("L") : "" });
  path.dataset.setting = setting;
  nodes.push(path);
  if (points.length === 1)
    nodes.push(svg("circle", { cx: x(points[0].epoch), cy: y(points[0].mean), r: 3, style: fill }));
  return nodes;
}
function showValues(event, epoch, lines) {
  const here = lines.map(l => [l, l.points.find(p => p.epoch === epoch)]).filter(([, p]) => p);
  here.sort((a, b) => b[1].mean - a[1].mean);
  if (here.length) showTip(event, html("b", {}, `epoch ${epoch}`), ...here.map(([l, p]) => {
    const background = l.stroke.replace("var(--ink)", "currentColor");
    const swatch = html("i", { class: "swatch", style: `background:${background}` });
    return html("div", {}, html("span", {}, swatch, l.label ?? l.setting), html("span", {}, format(p.mean)));
  }));
}

function drawCurves() {
  const visible = settings.filter(s => !state.hidden.has(s) && data.curves[s]);
  const title = name => data.columns[name].title;
  let charts, hint = "";
  if (state.layout === "together") {
    charts = [...new Set([...data.losses, state.curve])].map(name => lineChart(title(name), visible.map(setting => (
      { setting, points: curve(setting, name), stroke: colour(setting), dashed: dash(setting) }))));
  } else { // one panel per setting, over the reference in grey, all on one scale
    const names = state.layout === "losses" ? [...data.losses].reverse() : [state.curve];
    const lines = setting => names.map((name, i) => ({ setting, label: `${setting} ${title(name)}`,
      points: curve(setting, name), stroke: colour(setting), dashed: i ? "3 4" : "" }));
    const grey = lines(data.reference).map(l => ({ ...l, stroke: "var(--soft)" }));
    const panels = visible.filter(s => s !== data.reference);
    const points = [...grey, ...panels.flatMap(lines)].flatMap(l => l.points);
    const domain = points.length ? range(points) : undefined;
    charts = panels.map(setting => lineChart(setting, [...grey, ...lines(setting)], domain));
    hint = ` Grey: ${data.reference}.` + (names.length > 1 ? ` Solid: ${names.map(title).join(", dotted: ")}.` : "");
  }
  $("curve-charts").replaceChildren(...charts);
  $("curve-hint").textContent = "Line: mean over the seeds. Band: lowest to highest seed." + hint;
}
function highlight(setting) {
  for (const path of document.querySelectorAll("#curve-charts path.line")) {
    path.style.opacity = setting && path.dataset.setting !== setting ? .15 : 1;
    path.style.strokeWidth = setting && path.dataset.setting === setting ? 3.5 : "";
  }
}

function startCurves() {
  const trained = settings.filter(s => data.curves[s]);
  const icon = s => svg("svg", { width: 26, height: 8 }, svg("line", { x1: 1, x2: 25, y1: 4, y2: 4,
    style: `stroke:${colour(s)}`, "stroke-width": 3, "stroke-dasharray": dash(s) }));
  choices("settings", trained.map(s => [s, s, icon(s)]), s => !state.hidden.has(s), s => {
    if (!state.hidden.delete(s)) state.hidden.add(s);
    drawCurves();
    drawGaps();
  });
  [...document.querySelector('[data-group="settings"]').children].forEach((button, i) => {
    button.onmouseenter = button.onfocus = () => highlight(trained[i]);
    button.onmouseleave = button.onblur = () => highlight(null);
  });
  const layouts = [["together", "all together"]];
  if (data.losses.length) layouts.push(["losses", `losses, each against ${data.reference}`]);
  const quality = data.metrics.filter(name => !data.losses.includes(name));
  if (quality.length) layouts.push(["metric", `a metric, each against ${data.reference}`]);
  choices("layout", layouts, v => v === state.layout, v => { state.layout = v; drawCurves(); });
  if (!quality.includes(state.curve)) state.curve = quality[0] ?? state.curve;
  choices("curve", quality.map(name => [name, data.columns[name].title]), v => v === state.curve,
    v => { state.curve = v; drawCurves(); });
  drawCurves();
}
