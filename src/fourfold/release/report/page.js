// The map, the table and the charts. Text reaches the page through textContent and Vega alone.
const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.rows, count = rows.layer.length;
const layerName = (layer) => layer < data.decoder ? String(layer) : "draft head"; // draft experts come after the last layer
const element = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");

// --- the look of charts -----------------------------------------------------------------------------------------

function look() {
  const css = getComputedStyle(document.documentElement);
  const colour = (name) => css.getPropertyValue(name).trim();
  const [front, faint, line] = [colour("--front"), colour("--faint"), colour("--line")];
  return {
    background: "transparent",
    font: "system-ui, sans-serif",
    view: { stroke: line },
    title: { color: front, fontSize: 15, anchor: "start" },
    axis: { labelColor: front, titleColor: faint, gridColor: line, domainColor: faint, tickColor: faint, labelFontSize: 12 },
    legend: {
      labelColor: front, titleColor: faint, orient: "bottom", columns: innerWidth < 600 ? 2 : 3, labelFontSize: 12,
      layout: { bottom: { direction: innerWidth < 600 ? "vertical" : "horizontal", anchor: "start", margin: 16 } },
    },
    range: { category: dark.matches
      ? ["#8ab4f8", "#fdd663", "#f28b82", "#81c995", "#c58af9", "#78d9ec"]
      : ["#0b57d0", "#b06000", "#b3261e", "#146c2e", "#7b1fa2", "#00696d"] },
  };
}

// ast: expressions are interpreted, so that the page's policy need not allow `eval`.
const embed = (id, spec, renderer) =>
  window.vegaEmbed(element(id), spec, { actions: false, ast: true, renderer, config: look(), hover: false });

async function drawCharts() {
  for (const [id, spec] of Object.entries(data.charts)) await embed(id, spec, "svg");
}

// --- the table: only rows in sight are elements -------------------------------------------------------------------

const short = (value) => (value === null ? "" : value.toPrecision(3));
const share = (value) => value.toFixed(2);
const whole = (value) => Math.round(value).toLocaleString("en");
const columns = [
  ["layer", layerName], ["expert", String], ["projection", (value) => rows.projections[value]],
  ["error_over_rtn", share], ["relative_error", short], ["method", (value) => rows.methods[value]], ["tokens", whole],
  ["effective_tokens", whole], ["weight_error", short], ["loss", short], ["damping", short], ["passes", String],
];
if (rows.ratio) columns.push(["ratio", short]);
const ROW = 28, SPARE = 8; // pixels of a row; rows beyond those in sight
const names = Array.from({ length: count }, (_, row) =>
  `${rows.layer[row] < data.decoder ? "layer " : ""}${layerName(rows.layer[row])} expert ${rows.expert[row]} ${rows.projections[rows.projection[row]]} ${rows.methods[rows.method[row]]} `);
const table = element("table"), head = element("head"), space = element("space");
let shown = [], order = { column: "error_over_rtn", falling: false };

function buildHead() {
  document.documentElement.style.setProperty("--columns", columns.length);
  table.setAttribute("aria-colcount", columns.length);
  for (const [name] of columns) {
    const cell = document.createElement("div"), button = document.createElement("button");
    cell.setAttribute("role", "columnheader");
    cell.setAttribute("aria-sort", "none");
    cell.dataset.column = name;
    button.type = "button";
    button.addEventListener("click", () => sortBy(name));
    cell.append(button);
    head.append(cell);
  }
}

function sortBy(name) {
  order = { column: name, falling: order.column === name && !order.falling };
  for (const cell of head.children) {
    const mine = cell.dataset.column === name, way = order.falling ? "descending" : "ascending";
    cell.setAttribute("aria-sort", mine ? way : "none");
    cell.firstChild.textContent = cell.dataset.column.replaceAll("_", " ").replace("rtn", "RTN") + (mine ? (order.falling ? " ▼" : " ▲") : "");
  }
  arrange();
}

// "layer 3 expert 17 down": a number after `layer` or `expert` is that one; any other word is part of a name.
function matcher(text) {
  const wanted = text.toLowerCase().replace(/\b(layer|expert)\s+(\d+)/g, "$1=$2").split(/\s+/).filter(Boolean);
  const exact = [], parts = [];
  for (const word of wanted) {
    const [name, number] = word.split("=");
    if (number !== undefined && (name === "layer" || name === "expert")) exact.push([rows[name], Number(number)]);
    else parts.push(word);
  }
  return (row) => exact.every(([column, value]) => column[row] === value) && parts.every((part) => names[row].includes(part));
}

function arrange() {
  const fits = matcher(element("search").value);
  shown = [];
  for (let row = 0; row < count; row++) if (fits(row)) shown.push(row);
  const values = rows[order.column], sign = order.falling ? -1 : 1;
  shown.sort((a, b) => (values[a] === null) - (values[b] === null) || sign * (values[a] - values[b]) || a - b);
  element("found").textContent = `${whole(shown.length)} ${shown.length === 1 ? "row" : "rows"}`;
  table.setAttribute("aria-rowcount", shown.length + 1);
  space.style.height = `${shown.length * ROW}px`;
  table.scrollTop = 0;
  paint();
}

function paint() {
  const first = Math.max(0, Math.floor(table.scrollTop / ROW) - SPARE);
  const last = Math.min(shown.length, Math.ceil((table.scrollTop + table.clientHeight) / ROW) + SPARE);
  const lines = [];
  for (let place = first; place < last; place++) {
    const line = document.createElement("div");
    line.className = "row";
    line.setAttribute("role", "row");
    line.setAttribute("aria-rowindex", place + 2);
    line.style.top = `${place * ROW}px`;
    for (const [name, form] of columns) {
      const cell = document.createElement("span");
      cell.setAttribute("role", "cell");
      cell.textContent = form(rows[name][shown[place]]);
      line.append(cell);
    }
    lines.push(line);
  }
  space.replaceChildren(...lines);
}

function search(text) {
  element("search").value = text;
  arrange();
}

// --- the map: axes and legend are Vega's, cells are pixels of a picture laid over it, as 10,000 marks take 0.2 s --------

const layers = [...new Set(rows.layer)].filter((layer) => layer < data.decoder).sort((a, b) => a - b), experts = [...new Set(rows.expert)].sort((a, b) => a - b);
const picture = Object.assign(document.createElement("canvas"), { id: "cells" });
let map = null; // what is drawn: { view, field, projection, at: row by place of layer and of expert }
let cursor = null; // [place in layers, place in experts]

const figure = (field, row) => (field === "method" ? rows.methods[rows.method[row]] : rows[field][row]);
const inWords = (field, row) => Object.fromEntries(columns)[field](rows[field][row]);

function rowsAt(projection) {
  const down = new Map(layers.map((layer, place) => [layer, place])), across = new Map(experts.map((expert, place) => [expert, place]));
  const at = layers.map(() => new Array(experts.length).fill(null));
  for (let row = 0; row < count; row++) {
    if (rows.projection[row] === projection && rows.layer[row] < data.decoder) at[down.get(rows.layer[row])][across.get(rows.expert[row])] = row;
  }
  return at;
}

// What a legend is labelled with: its ends, and between them powers of ten.
function marks([low, high], scale) {
  const powers = Array.from({ length: 24 }, (_, place) => 10 ** (place - 14)).filter((power) => power > low && power < high && (scale === "log" || power >= 1));
  return scale === "linear" ? undefined : [low, ...powers, high];
}

function colours(field, values) {
  const { title, scale } = data.maps[field];
  if (field === "method") return { field: "value", type: "nominal", title, scale: { domain: [...new Set(values)].sort() } };
  const domain = values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  return {
    field: "value", type: "quantitative", title, scale: { type: scale, scheme: "viridis", domain },
    legend: { gradientLength: 300, tickCount: 4, values: marks(domain, scale), format: ",.3~r", labelOverlap: true },
  };
}

async function drawMap() {
  const field = element("map-field").value, projection = Number(element("map-projection").value), at = rowsAt(projection);
  const drawn = (row) => row !== null && figure(field, row) !== null && (data.maps[field].scale !== "log" || figure(field, row) > 0);
  const spec = structuredClone(data.map);
  spec.encoding.x.scale = { domain: experts };
  spec.encoding.y.scale = { domain: layers };
  spec.encoding.color = colours(field, at.flat().filter(drawn).map((row) => figure(field, row)));
  spec.description = `${data.maps[field].title} of ${rows.projections[projection]}: experts across, layers down`;
  element("map").setAttribute("aria-label", spec.description);
  const { view } = await embed("map", spec, "canvas");
  map = { view, field, projection, at };
  const colour = view.scale("color"), brush = picture.getContext("2d");
  [picture.width, picture.height] = [experts.length, layers.length];
  at.forEach((across, down) => across.forEach((row, right) => {
    if (!drawn(row)) return;
    brush.fillStyle = colour(figure(field, row));
    brush.fillRect(right, down, 1, 1);
  }));
  view.addResizeListener(placePicture);
  placePicture();
  element("map").append(picture);
  element("map").dataset.drawn = `${field} ${projection}`;
}

function placePicture() {
  const { view } = map, padding = view.padding(), [x, y] = view.origin();
  Object.assign(picture.style, {
    left: `${padding.left + x}px`, top: `${padding.top + y}px`, width: `${view.width()}px`, height: `${view.height()}px`,
  });
}

function under(event) {
  const box = picture.getBoundingClientRect();
  const place = (at, size, count) => Math.min(Math.max(Math.floor((at / size) * count), 0), count - 1);
  return map.at[place(event.clientY - box.top, box.height, layers.length)][place(event.clientX - box.left, box.width, experts.length)];
}

function hover(event) {
  const row = event.type === "mouseleave" ? null : under(event);
  map.view.tooltip()(null, event, null, row === null ? null : {
    layer: rows.layer[row], expert: rows.expert[row], projection: rows.projections[map.projection],
    ...Object.fromEntries(["method", "tokens", map.field].map((field) => [data.maps[field].title, inWords(field, row)])),
  });
}

function choose(layer, expert) {
  search(`layer ${layer} expert ${expert}`);
  element("map-said").textContent = `Layer ${layer}, expert ${expert}: its rows are in the table.`;
  element("projections").scrollIntoView({ block: "nearest" });
}

function moveCursor(event) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  if (event.key === "Enter" && cursor) return choose(layers[cursor[0]], experts[cursor[1]]);
  if (!(event.key in steps)) return;
  event.preventDefault();
  const [down, right] = cursor ? steps[event.key] : [0, 0], [layer, expert] = cursor ?? [0, 0];
  cursor = [Math.min(Math.max(layer + down, 0), layers.length - 1), Math.min(Math.max(expert + right, 0), experts.length - 1)];
  const row = map.at[cursor[0]][cursor[1]], value = row === null ? "not quantized" : inWords(map.field, row);
  element("map-said").textContent = `Layer ${layers[cursor[0]]}, expert ${experts[cursor[1]]}: ${data.maps[map.field].title} ${value}`;
}

// --- start --------------------------------------------------------------------------------------------------------

buildHead();
sortBy(order.column); // a second time: the worst first
element("search").addEventListener("input", arrange);
element("clear").addEventListener("click", () => search(""));
table.addEventListener("scroll", () => requestAnimationFrame(paint));
addEventListener("resize", paint);
element("map").addEventListener("keydown", moveCursor);
for (const what of ["mousemove", "mouseleave"]) picture.addEventListener(what, hover);
picture.addEventListener("click", (event) => {
  const row = under(event);
  if (row !== null) choose(rows.layer[row], rows.expert[row]);
});
for (const id of ["map-field", "map-projection"]) element(id).addEventListener("change", drawMap);
dark.addEventListener("change", () => { drawMap(); drawCharts(); });
await drawMap();
await drawCharts();
document.documentElement.dataset.ready = "yes";
