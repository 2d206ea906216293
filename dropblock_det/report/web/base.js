// What every page has: making elements, numbers, choices, a tip, tables that sort, light and dark.

"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

const $ = id => document.getElementById(id);
function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const svg = (tag, attributes = {}, ...children) =>
  filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const html = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);

const format = (value, digits = 4) => value.toFixed(digits).replace("-", "−");
const signed = (value, digits) => (value < 0 ? "" : "+") + format(value, digits);
const mean = values => values.reduce((a, b) => a + b, 0) / values.length;

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

/** A row of buttons of which those with isOn(value) are pressed; options are [value, label, icon]. */
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
for (const th of document.querySelectorAll("thead th:has(button)"))
  th.querySelector("button").onclick = () => sortTable(th);

$("theme").onclick = () => {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)").matches;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : system;
  root.dataset.theme = dark ? "light" : "dark";
};
