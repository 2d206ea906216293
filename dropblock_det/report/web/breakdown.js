// What an evaluation got wrong: images, curves, and what is taken for what.

const look = kind => `var(--look-${data.looks[kind]})`;
const swatch = kind => html("span", {}, html("i", { class: "swatch", style: `background:${look(kind)}` }), kind);

/** The truth is dashed, and below the predictions. A click makes it large. */
function exampleCard(example) {
  const figure = html("figure", { tabindex: 0, role: "button", "aria-expanded": false });
  const boxes = example.marks.filter(mark => mark.bbox).sort((a, b) => (a.score ?? -1) - (b.score ?? -1));
  function draw(large) {
    // What is found has its name from the detection; in a small picture the words would hide the rest.
    const named = mark => large || boxes.length < 9 && !(mark.score === null && data.looks[mark.kind] === 0);
    const groups = boxes.map(mark => [[named(mark) ? mark : { ...mark, category: "" }], look(mark.kind),
      mark.score === null ? [2, 1.4] : ""]);
    figure.classList.toggle("large", large);
    figure.setAttribute("aria-expanded", large);
    figure.replaceChildren(picture(example, groups, large ? .45 : 1),
      html("figcaption", {}, example.note, html("small", {}, example.title)));
  }
  const toggle = () => draw(!figure.classList.contains("large"));
  figure.onclick = toggle;
  figure.onkeydown = event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(); } };
  draw(false);
  return figure;
}
function startExamples() {
  const shown = data.examples.filter(([, images]) => images.length);
  $("examples").hidden = !shown.length;
  if (!shown.length) return;
  const state = { shown: 0 };
  const draw = () => $("cards").replaceChildren(...shown[state.shown][1].map(exampleCard));
  choices("examples", shown.map(([heading], i) => [i, heading]), i => i === state.shown,
    i => { state.shown = i; draw(); });
  const boxes = shown.flatMap(([, images]) => images).flatMap(image => image.marks).filter(mark => mark.bbox);
  const kinds = Object.keys(data.looks).filter(kind => boxes.some(mark => mark.kind === kind));
  $("keys").replaceChildren(...kinds.map(swatch), ...(kinds.length ? ["Dashed: the truth."] : []),
    " Click an image to enlarge it.");
  $("cards").classList.toggle("small", !boxes.length);
  draw();
}

function startCurves() {
  if (!data.curves) return;
  const { names, recall, lines } = data.curves, select = $("curve");
  select.append(...names.map((name, i) => html("option", { value: i }, name)));
  const draw = () => {
    const line = (i, more) => values => ({ label: names[i], ...more,
      points: values[i].map((mean, n) => ({ x: recall[n], mean })) });
    const drawn = [line(+select.value, { stroke: "var(--accent)" })];
    if (select.value > 0) drawn.unshift(line(0, { stroke: "var(--soft)", dashed: "3 4" }));
    $("curve-charts").replaceChildren(...Object.entries(lines).map(([title, values]) =>
      lineChart(title, drawn.map(of => of(values)), { domain: [0, 1], axis: "recall", whole: false })));
  };
  select.onchange = draw;
  draw();
}

function drawMatrix() {
  const { categories, nothing, totals, cells } = data.confusion;
  const [rows, columns] = nothing ? nothing.map(name => [...categories, name]) : [categories, categories];
  const short = name => name.length > 18 ? name.slice(0, 17) + "…" : name;
  const room = 14 + 7.4 * Math.max(...[...rows, ...columns].map(name => short(name).length));
  const fits = ($("confusion").clientWidth - 50 - room) / columns.length;
  const size = Math.max(11, Math.min(46, Math.floor(fits))), numbers = size >= 24;
  const width = room + size * columns.length + 4, height = room + size * rows.length + 4;
  const chart = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": "Confusion matrix", style: `max-width:none;--size:${Math.min(13, size + 1)}px` });
  const edge = i => room + i * size, middle = i => edge(i + .5);
  rows.forEach((name, i) => chart.append(
    svg("text", { class: "axis-name", x: room - 6, y: middle(i) + 4, "text-anchor": "end" }, short(name))));
  columns.forEach((name, i) => chart.append(svg("text", { class: "axis-name", "text-anchor": "start",
    transform: `translate(${middle(i) + 4} ${room - 6}) rotate(-90)` }, short(name))));
  for (let i = 0; i <= rows.length; i++) chart.append(
    svg("line", { class: "grid", x1: room, x2: edge(columns.length), y1: edge(i), y2: edge(i) }),
    svg("line", { class: "grid", y1: room, y2: edge(rows.length), x1: edge(i), x2: edge(i) }));
  for (const [r, c, count] of cells) {
    const part = count / totals[r], right = r === c && r < categories.length;
    const box = svg("rect", { x: edge(c) + .5, y: edge(r) + .5, rx: 2, width: size - 1,
      height: size - 1, style: `fill:${right ? "var(--good)" : "var(--bad)"}`, opacity: .1 + .85 * part });
    box.onpointermove = event => showTip(event, html("b", {}, `${rows[r]} → ${columns[c]}`),
      html("div", {}, html("span", {}, "count"), html("span", {}, count)),
      html("div", {}, html("span", {}, "of the row"), html("span", {}, (100 * part).toFixed(1) + " %")));
    box.onpointerleave = hideTip;
    chart.append(box);
    if (numbers) chart.append(svg("text", { class: part > .5 ? "inside" : "name", x: middle(c), y: middle(r) + 4,
      "text-anchor": "middle", "pointer-events": "none" }, count));
  }
  $("matrix").replaceChildren(chart);
}

startExamples();
startCurves();
drawMatrix();
