// The gap between training and validation, at the last epoch and at the best one.

function drawGaps() {
  const names = data.gaps;
  if (!names.length) { $("gaps").hidden = true; return; }
  const box = $("gap-chart"), width = Math.max(280, box.clientWidth), narrow = width < 640;
  const rows = settings.filter(s => !state.hidden.has(s))
    .map(setting => ({ setting, cells: names.map(name => resultOf.get(setting).cells[name]) }));
  const all = rows.flatMap(r => r.cells.flatMap(cell => Object.values(cell.values))).concat(0);
  const low = Math.min(...all), high = Math.max(...all) + (Math.max(...all) - low || 1) * .04;
  const left = narrow ? 8 : Math.min(230, 24 + 7.4 * Math.max(...settings.map(s => s.length)));
  const right = 70, step = narrow ? 58 : 42, height = rows.length * step + 6;
  const x = v => left + (v - low) / (high - low || 1) * (width - left - right);
  const chart = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": "gap between validation and training loss per setting" });
  rows.forEach(({ setting, cells }, i) => {
    const y = i * step + (narrow ? 20 : 4);
    chart.append(svg("text", { class: "name", x: narrow ? left : left - 12, y: narrow ? y - 5 : y + 21,
      "text-anchor": narrow ? "start" : "end" }, setting));
    cells.forEach((cell, j) => {
      if (cell.mean === null) return;
      const top = y + 16 * j, seeds = Object.values(cell.values).map(x);
      chart.append(svg("rect", { x: Math.min(x(0), x(cell.mean)), y: top, width: Math.abs(x(cell.mean) - x(0)),
        height: 13, rx: 2, style: `fill:${colour(setting)}`, opacity: j ? .4 : 1 }));
      for (const at of seeds) chart.append(svg("line", { x1: at, x2: at, y1: top - 1, y2: top + 14,
        style: "stroke:var(--soft)", "stroke-width": 1.5 }));
      chart.append(svg("text", { x: Math.max(x(0), ...seeds) + 6, y: top + 11 }, signed(cell.mean, 3)));
    });
  });
  chart.append(svg("line", { class: "axis", x1: x(0), x2: x(0), y1: 0, y2: height }));
  box.replaceChildren(chart);
}
