// The training: a metric over the epochs.

function curve(setting, name) {
  const byEpoch = new Map(), scale = data.columns[name].scale;
  for (const metrics of Object.values(data.curves[setting] ?? {}))
    for (const [epoch, value] of metrics[name])
      byEpoch.set(epoch, [...(byEpoch.get(epoch) ?? []), value * scale]);
  return [...byEpoch].sort((a, b) => a[0] - b[0]).map(([epoch, values]) => (
    { x: epoch + 1, mean: mean(values), low: Math.min(...values), high: Math.max(...values) }));
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
    charts = panels.map(setting => lineChart(setting, [...grey, ...lines(setting)], { domain }));
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
