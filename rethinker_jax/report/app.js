"use strict";
// What both halves of the page use, and the curves. rollouts.js follows in the same script.
// Everything that came from the run is put into the page as text (textContent), never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

function make(tag, className, ...content) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...content.filter((part) => part !== null && part !== undefined));
  return node;
}

// ---- curves: point at one, read all ----

function formatValue(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "share") return `${(100 * value).toFixed(1)}%`;
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e7)) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3))) + (unit === "seconds" ? " s" : "");
}

function lastKnown(values) {
  for (let i = values.length - 1; i >= 0; i--) if (values[i] !== null) return values[i];
  return null;
}

const figures = [...document.querySelectorAll("[data-chart]")].map((figure) => {
  const legend = figure.querySelector(".legend");
  const when = make("span", "when");
  if (!figure.closest(".small")) figure.append(when);
  return {
    chart: data.charts[figure.dataset.chart],
    svg: figure.querySelector("svg"),
    cursor: figure.querySelector(".cursor"),
    values: [...legend.querySelectorAll("b")],
    when,
  };
});

function place(chart, index, value) {
  const [left, right, top, bottom] = chart.frame;
  const height = chart.log ? Math.log10(value) : value;
  const x = left + ((data.steps[index] - chart.x[0]) / (chart.x[1] - chart.x[0])) * (right - left);
  const y = bottom - ((height - chart.y[0]) / (chart.y[1] - chart.y[0])) * (bottom - top);
  return [x, y];
}

function svgNode(tag, attributes, className) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (className) node.setAttribute("class", className);
  return node;
}

function readOut(index) {
  for (const { chart, cursor, values, when } of figures) {
    cursor.replaceChildren();
    when.textContent = index === null ? "" : `step ${data.steps[index].toLocaleString("en")}`;
    chart.series.forEach((series, i) => {
      const value = index === null ? lastKnown(series.values) : series.values[index];
      values[i].textContent = formatValue(value, chart.unit);
    });
    if (index === null) continue;
    const [x] = place(chart, index, 1);
    cursor.append(svgNode("line", { x1: x, x2: x, y1: chart.frame[2], y2: chart.frame[3] }));
    for (const series of chart.series) {
      const value = series.values[index];
      if (value === null) continue;
      const [cx, cy] = place(chart, index, value);
      cursor.append(svgNode("circle", { cx, cy, r: 3.6 }, `s${series.color}`));
    }
  }
}

function nearestIndex(chart, svg, clientX) {
  const box = svg.getBoundingClientRect();
  const x = ((clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
  const step = chart.x[0] + ((x - chart.frame[0]) / (chart.frame[1] - chart.frame[0])) * (chart.x[1] - chart.x[0]);
  let best = 0;
  data.steps.forEach((s, i) => { if (Math.abs(s - step) < Math.abs(data.steps[best] - step)) best = i; });
  return best;
}

for (const { chart, svg } of figures) {
  svg.addEventListener("pointermove", (event) => readOut(nearestIndex(chart, svg, event.clientX)));
  svg.addEventListener("pointerleave", () => readOut(null));
}
readOut(null);
