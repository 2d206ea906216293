// The first drawing.

for (const dot of document.querySelectorAll("[data-swatch]")) dot.style.background = colour(dot.dataset.swatch);

const answered = Object.keys(data.answers).filter(name => data.columns[name].epoch === "last");
choices("metric", answered.map(name => [name, data.columns[name].title]), v => v === state.metric,
  v => { state.metric = v; drawForest(); });
choices("epoch", answered.length ? [["last", data.last], ["best", "best epoch"]] : [], v => v === state.epoch,
  v => { state.epoch = v; drawForest(); });
startCurves();
startSamples();
function draw() { drawForest(); drawGaps(); }
draw();
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
