// Sorting the table, light and dark, and the first drawing.

function sortTable(header) {
  const table = header.closest("table"), column = header.cellIndex, body = table.tBodies[0];
  const ascending = header.ariaSort !== "ascending";
  for (const th of table.tHead.rows[0].cells) th.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const value = row => row.cells[column].dataset.value;
  const order = (a, b) => {
    const [p, q] = [value(a), value(b)];
    if (p === "" || q === "") return (p === "") - (q === ""); // not measured: last, either way
    const difference = column === 0 ? p.localeCompare(q) : p - q;
    return ascending ? difference : -difference;
  };
  body.append(...[...body.rows].sort(order));
}
for (const th of document.querySelectorAll("#table thead th"))
  th.querySelector("button").onclick = () => sortTable(th);
for (const dot of document.querySelectorAll("[data-swatch]")) dot.style.background = colour(dot.dataset.swatch);

$("theme").onclick = () => {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)").matches;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : system;
  root.dataset.theme = dark ? "light" : "dark";
};

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
