// The answer: every setting's difference from the reference, in one column.

const columnName = () => [state.epoch === "best" ? `best_${state.metric}` : state.metric, state.metric]
  .find(name => name in data.answers);

function seedDifferences(setting, name) {
  const reference = resultOf.get(data.reference)?.cells[name].values ?? {};
  const values = resultOf.get(setting).cells[name].values;
  return Object.keys(values).filter(seed => seed in reference).map(seed => values[seed] - reference[seed]);
}

function drawForest() {
  const box = $("forest"), name = columnName();
  if (!name) return;
  const { digits, scale } = data.columns[name];
  $("answer-text").textContent = data.answers[name];
  $("power-text").textContent = data.power[name] ?? "";
  $("pairing-text").textContent = data.pairing[name] ?? "";
  $("images-text").textContent = data.images_words[name];
  $("images-text").hidden = $("images-hint").hidden = !data.images_words[name];
  const rows = others.map(setting => ({ setting, d: resultOf.get(setting).cells[name].difference,
    words: resultOf.get(setting).words[name], seeds: seedDifferences(setting, name),
    images: data.other_images[name]?.[setting] }));
  const ends = rows.flatMap(r => r.d ? [r.d.low ?? r.d.mean, r.d.high ?? r.d.mean, ...r.seeds,
    ...(r.images ? [r.images.low, r.images.high] : [])] : []).concat(0);
  const width = Math.max(280, box.clientWidth), narrow = width < 640;
  const longest = Math.max(...others.map(s => s.length), 8);
  const left = narrow ? 8 : Math.min(230, 24 + 7.4 * longest), right = narrow ? 8 : 250;
  const step = narrow ? 70 : 36, height = rows.length * step + 34; // narrow: name, words, marks, one below another
  let [low, high] = [Math.min(...ends), Math.max(...ends)];
  const pad = (high - low || 1) * .06; low -= pad; high += pad;
  const x = v => left + (v - low) / (high - low) * (width - left - right);
  const chart = svg("svg",
    { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": data.answers[name] });
  const marks = ticks(low * scale, high * scale, narrow ? 4 : 6);
  for (const t of marks) chart.append(
    svg("line", { class: "grid", x1: x(t / scale), x2: x(t / scale), y1: 0, y2: height - 22 }),
    svg("text", { x: x(t / scale), y: height - 6, "text-anchor": "middle" }, tickText(t, marks)));
  chart.append(svg("line", { class: "axis", x1: x(0), x2: x(0), y1: 0, y2: height - 22 }));
  rows.forEach(({ setting, d, words, seeds, images }, i) => {
    const y = i * step + (narrow ? 50 : 18), stroke = `stroke:${colour(setting)}`;
    const label = narrow && setting.length > 38 ? setting.slice(0, 37) + "…" : setting;
    chart.append(
      svg("text", { class: "name", x: narrow ? left : left - 12, y: narrow ? y - 31 : y + 4,
        "text-anchor": narrow ? "start" : "end" }, label),
      svg("text", { x: narrow ? left : width - right + 14, y: narrow ? y - 14 : y + 4, class: d?.shown ? "shown" : "" },
      d ? `${signed(d.mean * scale, digits)}  ${words.verdict}` : words.verdict));
    if (!d) return;
    if (d.own) chart.append(svg("line", { x1: x(Math.max(low, d.own[0])), x2: x(Math.min(high, d.own[1])),
      y1: y, y2: y, style: stroke, "stroke-width": 1.2, opacity: .55 })); // far wider with two seeds: cut off
    if (d.low !== null) chart.append(svg("line", { x1: x(d.low), x2: x(d.high), y1: y, y2: y, style: stroke,
      "stroke-width": 3.5, "stroke-linecap": "round" }));
    if (images) chart.append(svg("line", { x1: x(images.low), x2: x(images.high), y1: y + 10, y2: y + 10,
      style: stroke, "stroke-width": 2, "stroke-dasharray": "1.5 3" }));
    for (const s of seeds)
      chart.append(svg("line", { x1: x(s), x2: x(s), y1: y - 5, y2: y + 5, style: stroke, "stroke-width": 1.5 }));
    chart.append(svg("circle", { cx: x(d.mean), cy: y, r: 6, "stroke-width": 2.5,
      style: `${stroke};fill:${d.shown ? colour(setting) : "var(--card)"}` }));
  });
  box.replaceChildren(chart);
  drawDetails(rows, data.columns[name]);
}

/** What stands behind the picture, in numbers. */
function drawDetails(rows, { scale, digits }) {
  const ends = pair => pair && pair[0] !== null ? pair.map(v => signed(v * scale, digits)).join(" to ") : "–";
  $("details").replaceChildren(...rows.map(({ setting, d, words, images }) => {
    const cells = d ? [signed(d.mean * scale, digits), ends([d.low, d.high]), ends(d.own),
      ends(images && [images.low, images.high]), words.seeds] : [];
    return html("tr", {}, html("td", {}, setting), ...cells.map(text => html("td", {}, text)));
  }));
}
