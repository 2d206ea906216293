// A chart of lines, with the values at the pointer.

function range(points) {
  const low = Math.min(...points.map(p => p.low)), high = Math.max(...points.map(p => p.high));
  const pad = (high - low || Math.abs(high) || 1) * .05;
  return [low - pad, high + pad];
}

/** Lines are { setting, label, points: [{ x, mean, low, high }], stroke, dashed }; low and high make a band. */
function lineChart(title, lines, { domain, axis = "epoch", whole = true } = {}) {
  const box = html("div", {}, html("h3", {}, title));
  const width = 380, height = 240, bottom = 34, top = 8, right = 12;
  const points = lines.flatMap(l => l.points);
  if (!points.length) { box.append(html("p", { class: "hint" }, "not measured")); return box; }
  const places = [...new Set(points.map(p => p.x))].sort((a, b) => a - b);
  const first = places[0], last = places.at(-1);
  const [low, high] = domain ?? range(points);
  const marks = ticks(low, high, 5);
  const left = Math.max(46, 10 + 7 * Math.max(...marks.map(t => tickText(t, marks).length)));
  const x = v => left + (last > first ? (v - first) / (last - first) : .5) * (width - left - right);
  const y = v => top + (high - v) / (high - low) * (height - top - bottom);
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", role: "img", "aria-label": title });
  for (const t of marks) chart.append(
    svg("line", { class: "grid", x1: left, x2: width - right, y1: y(t), y2: y(t) }),
    svg("text", { x: left - 6, y: y(t) + 4, "text-anchor": "end" }, tickText(t, marks)));
  const below = ticks(first, last, 6).filter(t => !whole || Number.isInteger(t));
  for (const t of below)
    chart.append(svg("text", { x: x(t), y: height - bottom + 16, "text-anchor": "middle" }, tickText(t, below)));
  chart.append(svg("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, axis));
  for (const line of lines) chart.append(...drawnLine(line, x, y));
  const cross = svg("line", { class: "axis", y1: top, y2: height - bottom, visibility: "hidden" });
  chart.append(cross);
  chart.addEventListener("pointermove", event => {
    const at = chart.getBoundingClientRect(), px = (event.clientX - at.left) / at.width * width;
    const here = places.reduce((a, b) => Math.abs(x(b) - px) < Math.abs(x(a) - px) ? b : a);
    for (const end of ["x1", "x2"]) cross.setAttribute(end, x(here));
    cross.setAttribute("visibility", "visible");
    showValues(event, `${axis} ${whole ? here : here.toFixed(2)}`,
      lines.map(l => [l, l.points.find(p => p.x === here)]));
  });
  chart.addEventListener("pointerleave", () => { hideTip(); cross.setAttribute("visibility", "hidden"); });
  box.append(chart);
  return box;
}
function drawnLine({ points, setting, stroke, dashed }, x, y) {
  const nodes = [], fill = `fill:${stroke}`, at = (points, end) => points.map(p => `${x(p.x)},${y(p[end])}`);
  if (points.some(p => p.high > p.low)) {
    const outline = [...at(points, "high"), ...at(points, "low").reverse()].join("L");
    nodes.push(svg("path", { class: "faint", style: fill, d: `M${outline}Z` }));
  }
  const path = svg("path", { class: "line", style: `stroke:${stroke}`, "stroke-dasharray": dashed,
    d: points.length ? "M" + at(points, "mean").join("L") : "" });
  if (setting) path.dataset.setting = setting;
  nodes.push(path);
  if (points.length === 1)
    nodes.push(svg("circle", { cx: x(points[0].x), cy: y(points[0].mean), r: 3, style: fill }));
  return nodes;
}
function showValues(event, title, values) {
  const here = values.filter(([, p]) => p).sort((a, b) => b[1].mean - a[1].mean);
  if (here.length) showTip(event, html("b", {}, title), ...here.map(([l, p]) => {
    const background = l.stroke.replace("var(--ink)", "currentColor");
    const swatch = html("i", { class: "swatch", style: `background:${background}` });
    return html("div", {}, html("span", {}, swatch, l.label ?? l.setting), html("span", {}, format(p.mean)));
  }));
}
