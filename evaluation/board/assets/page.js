"use strict";
// Draws the leaderboard from the JSON in #data. Every string of a record becomes text: a node's textContent, or escaped where DataTables takes HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const PAGE_ROWS = 50;
const PUBLISHED_ROWS = 20;
const PALETTE = ["#3d75b8", "#cf6a2e", "#2f9e78", "#a9569a", "#b08d24", "#c2475a", "#4c9fb5", "#7a7f87"];
const SYMBOLS = ["circle", "diamond", "square", "triangle"];
const COST_TITLES = { macs_image: "sampling cost", params: "size", train_macs: "training cost" };
const tables = []; // { table: DataTables API, columns, redraw: matching row numbers -> void }

// -- building blocks ------------------------------------------------------------------------------------------------------------

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

function escaped(text) {
  return String(text).replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}

function folded(summary, ...children) {
  return element("details", {}, element("summary", {}, summary), ...children);
}

/** Calls `draw` when the element comes near the screen, or before printing. */
function whenSeen(node, draw) {
  const observer = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && now(), { rootMargin: "400px" });
  const now = () => {
    observer.disconnect();
    removeEventListener("beforeprint", now);
    draw();
  };
  observer.observe(node);
  addEventListener("beforeprint", now);
}

// -- tables ---------------------------------------------------------------------------------------------------------------------

const LONG = new Set(["note", "evaluator", "guidance", "source", "table", "contact", "reason", "about"]);
const NAMES = new Set(["run", "system"]);

function headerOf(column) {
  const arrow = { lower: " ↓", higher: " ↑" }[column.better] || "";
  const unit = column.unit ? `<small>${escaped(column.unit)}</small>` : "";
  return `<span title="${escaped(column.hint)}">${escaped(column.label || "#")}${arrow}${unit}</span>`;
}

function cellText(cell) {
  const [value, error] = cell[0].split(" ± ");
  return cell.length > 2 && error ? `${escaped(value)} <span class="error">± ${escaped(error)}</span>` : escaped(cell[0]);
}

/** What DataTables gets of a cell: HTML to show, escaped text to search, a number or string to sort. Cells are [text], [text, value] or [text, value, error]. */
function rendered(index) {
  return (row, type) => {
    const cell = row[index];
    if (type === "display") return cellText(cell);
    if (type === "filter") return escaped(cell[0]);
    return cell.length > 1 ? cell[1] : cell[0] === "-" ? "" : cell[0];
  };
}

/** Numbers before words, and what is absent last in both directions. */
function compare(a, b, sign) {
  if (a === "" || b === "") return (a === "") - (b === "");
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
}

DataTable.type("absent-last", { order: { asc: (a, b) => compare(a, b, 1), desc: (a, b) => compare(a, b, -1) } });

function classOf(column, rows, index) {
  if (NAMES.has(column.key)) return "text name";
  if (column.key === "contact") return "text long contact";
  if (LONG.has(column.key)) return "text long";
  if (column.key === "method") return "text method";
  return rows.some((row) => typeof row[index][1] === "number") ? "number" : "text";
}

/** The line of held-out real images. It stands in the table's foot, where no order and no filter moves it. */
function footOf(columns, rows, foot) {
  return foot && element("tfoot", {}, element("tr", {}, ...foot.map((text, index) => element("td", { class: classOf(columns[index], rows, index) }, text === "-" ? "" : text))));
}

/** A sortable, filterable table; `redraw` is called with the row numbers that pass the filter. */
function sortableTable({ columns, rows, best, foot }, caption, pageRows, redraw = () => {}) {
  const node = element("table", { "aria-label": caption }, footOf(columns, rows, foot));
  const marks = best.map((chosen) => new Set(chosen));
  const place = element("div", {}, node);
  whenAttached.push(() => {
    const table = new DataTable(node, {
      data: rows,
      columns: columns.map((column, index) => ({
        title: headerOf(column),
        data: rendered(index),
        type: "absent-last",
        className: classOf(column, rows, index),
        visible: column.essential,
        orderSequence: column.better === "higher" ? ["desc", "asc"] : ["asc", "desc"],
        createdCell: (cell, _, __, row) => {
          if (marks[index].has(row)) cell.classList.add("best");
          if (NAMES.has(column.key)) cell.title = rows[row][index][0];
        },
      })),
      order: columns[0].key === "rank" ? [[0, "asc"]] : [],
      autoWidth: false,
      paging: rows.length > pageRows,
      pageLength: pageRows,
      layout: { topStart: null, topEnd: null, bottomStart: "info", bottomEnd: rows.length > pageRows ? "paging" : null },
      language: { info: rows.length > pageRows ? "_START_ to _END_ of _TOTAL_ _ENTRIES-TOTAL_" : "_TOTAL_ _ENTRIES-TOTAL_", entries: { _: "rows", 1: "row" }, infoFiltered: "(_MAX_ in all)", infoEmpty: "no rows", emptyTable: "no rows", zeroRecords: "no row passes the filter" },
    });
    tables.push({ table, columns, redraw });
  });
  return place;
}

const whenAttached = []; // DataTables measures its table, so it starts when the page has it

function plainTable({ headers, cells }, caption, texts = [1, 3]) {
  const kind = (i) => (texts.includes(i) ? "text" : "number");
  const head = element("tr", {}, ...headers.map((text, i) => element("th", { scope: "col", class: kind(i) }, text)));
  const body = cells.map((row) => element("tr", {}, ...row.map((text, i) => element("td", { class: kind(i) }, text))));
  return element("div", { class: "scroll" }, element("table", { class: "plain", "aria-label": caption }, element("thead", {}, head), element("tbody", {}, ...body)));
}

// -- plots ----------------------------------------------------------------------------------------------------------------------

const methods = [...new Set(data.sections.flatMap((section) => section.groups.flatMap((group) => group.methods)))].sort();
const spaces = [...new Set(data.sections.flatMap((section) => section.groups.flatMap(spacesOf)))].sort().reverse();

function columnIndex(group, key) {
  return group.table.columns.findIndex((column) => column.key === key);
}

function spacesOf(group) {
  const index = columnIndex(group, "space");
  return group.table.rows.map((row) => (index < 0 ? "" : row[index][0]));
}

const colour = (method) => PALETTE[methods.indexOf(method) % PALETTE.length];
const symbol = (space) => SYMBOLS[spaces.indexOf(space) % SYMBOLS.length];

function details(group, row) {
  return group.table.columns
    .map((column, i) => [column, group.table.rows[row][i][0]])
    .filter(([column, text]) => column.essential && column.key !== "rank" && text !== "-")
    .map(([column, text]) => (column.key === "run" ? text : `${column.label}: ${text}${column.unit ? ` ${column.unit}` : ""}`))
    .join("\n");
}

function pointsOf(group, plot) {
  const [cost, score] = [columnIndex(group, plot.column), columnIndex(group, group.scoreColumn)];
  const places = spacesOf(group);
  return plot.drawn.map((row) => {
    const [x, [, y, error]] = [group.table.rows[row][cost][1], group.table.rows[row][score]];
    const low = Math.max(y - (error || 0), y / 10); // a logarithmic axis has no zero
    return { row, x, y, low, high: y + (error || 0), method: group.methods[row], space: places[row], ranked: row < group.ranked, text: details(group, row) };
  });
}

/** A logarithmic scale with at most seven ticks where that is possible: all round values, or those that begin with 1 2 5, or 1 2, or 1. */
function logScale(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const pad = Math.max((high / low) ** 0.06, 1.05);
  const domain = [low / pad, high * pad];
  const round = d3.scaleLog(domain, [0, 1]).ticks(6);
  const choices = [/./, /^[125]e/, /^[12]e/, /^1e/].map((first) => round.filter((tick) => first.test(tick.toExponential())));
  const few = choices.find((ticks) => ticks.length <= 7) || choices.at(-1);
  return { type: "log", domain, ticks: few.length > 1 ? few : d3.ticks(...domain, 3) };
}

function tickText(tick) {
  return d3.format(tick >= 1e4 ? "~s" : "~r")(+tick.toPrecision(3));
}

/** Both axes with a grid; `text` is given because Plot drops some labels of logarithmic axes. */
function axes(x, y, xLabel, yLabel) {
  return [
    Plot.gridY(y.ticks),
    Plot.axisX(x.ticks, { text: tickText, label: `${xLabel} →`, labelAnchor: "center", labelArrow: "none" }),
    Plot.axisY(y.ticks, { text: tickText, label: yLabel, labelArrow: "none" }),
  ];
}

function scatter(group, plot, matching) {
  const points = pointsOf(group, plot);
  const column = group.table.columns[columnIndex(group, plot.column)];
  const front = plot.front.map((row) => points.find((point) => point.row === row));
  const shown = (point) => (!matching || matching.has(point.row) ? 1 : 0.12);
  const scores = points.flatMap((point) => [point.low, point.high]);
  const floor = group.floor > Math.min(...scores) / 1.5 ? [group.floor] : []; // a floor far below would squeeze the rows together
  const floorText = floor.length || !group.floor ? "real images" : `real images: ${d3.format(".4~g")(group.floor)} ↓`;
  const [x, y] = [logScale(points.map((point) => point.x)), logScale([...scores, ...floor])];
  return Plot.plot({
    width: 400, height: 290, marginLeft: 50, marginRight: 16, marginBottom: 40,
    ariaLabel: `${group.score} against ${column.label}; the table above holds the same numbers`,
    x, y,
    marks: [
      ...axes(x, y, `${column.label}${column.unit ? `, ${column.unit}` : ""}`, `${group.score} ↓`),
      Plot.ruleY(floor, { stroke: "currentColor", strokeOpacity: 0.5, strokeDasharray: "3,3" }),
      group.floor ? Plot.text([floorText], { y: floor[0], frameAnchor: floor.length ? "right" : "bottom-right", dy: -7, fill: "currentColor", fillOpacity: 0.65 }) : null,
      Plot.line(front, { x: "x", y: "y", curve: "step-after", stroke: "currentColor", strokeOpacity: 0.35, strokeWidth: 1.5 }),
      Plot.ruleX(points, { x: "x", y1: "low", y2: "high", stroke: (point) => colour(point.method), strokeOpacity: shown }),
      Plot.dot(points, { x: "x", y: "y", r: 4.5, symbol: (point) => symbol(point.space), fill: (point) => (point.ranked ? colour(point.method) : "var(--card)"), fillOpacity: shown, stroke: (point) => (point.ranked ? "var(--card)" : colour(point.method)), strokeOpacity: shown, strokeWidth: (point) => (point.ranked ? 0.8 : 1.6) }),
      Plot.tip(points, Plot.pointer({ x: "x", y: "y", title: "text", fill: "var(--card)", stroke: "var(--faint)", lineHeight: 1.3, maxRadius: 30 })),
    ],
    symbol: { range: SYMBOLS },
  });
}

function lineChart({ label, lines }, yLabel, logarithmic) {
  const colours = new Map(lines.map((line, i) => [line, PALETTE[i % PALETTE.length]]));
  const all = lines.flatMap((line) => line.points.map(([x, y, error]) => ({ run: line.run, colour: colours.get(line), x, y, low: y - (error || 0), high: y + (error || 0) })));
  const points = all.filter((point) => point.x > 0 && (!logarithmic || point.low > 0));
  const heights = points.flatMap((point) => [point.low, point.high]);
  const linear = d3.scaleLinear(d3.extent(heights), [0, 1]).nice();
  const [x, y] = [logScale(points.map((point) => point.x)), logarithmic ? logScale(heights) : { domain: linear.domain(), ticks: linear.ticks(6) }];
  return Plot.plot({
    width: 400, height: 270, marginLeft: 50, marginRight: 16, marginBottom: 40,
    ariaLabel: `${yLabel} against ${label}`,
    x, y,
    marks: [
      ...axes(x, y, label, yLabel),
      Plot.areaY(points, { x: "x", y1: "low", y2: "high", z: "run", fill: "colour", fillOpacity: 0.15 }),
      Plot.line(points, { x: "x", y: "y", z: "run", stroke: "colour", strokeWidth: 1.6 }),
      Plot.tip(points, Plot.pointer({ x: "x", y: "y", fill: "var(--card)", stroke: "var(--faint)", title: (point) => `${point.run}\n${yLabel}: ${d3.format(".4~g")(point.y)}\n${label}: ${d3.format(".3~s")(point.x)}` })),
    ],
    color: { type: "identity" },
  });
}

/** A figure that is drawn when it is seen, and again when the filter changes. */
function figure(title, draw) {
  const place = element("div");
  const node = element("figure", {}, element("figcaption", {}, title), place);
  let seen = false;
  let matching = null;
  const redraw = (rows) => {
    matching = rows;
    if (seen) place.replaceChildren(draw(matching));
  };
  whenSeen(node, () => {
    seen = true;
    redraw(matching);
  });
  return { node, redraw };
}

function swatch(shape, fill) {
  const path = d3.symbol(d3[`symbol${shape[0].toUpperCase()}${shape.slice(1)}`], 70)();
  return d3.create("svg").attr("viewBox", "-6 -6 12 12").attr("aria-hidden", "true").call((svg) => svg.append("path").attr("d", path).attr("fill", fill)).node();
}

function legend(group) {
  const [usedMethods, usedSpaces] = [[...new Set(group.methods)].sort(), [...new Set(spacesOf(group))].sort().reverse()];
  return element(
    "ul", { class: "legend" },
    ...usedMethods.map((method) => element("li", {}, swatch("circle", colour(method)), method)),
    ...usedSpaces.filter(Boolean).map((space) => element("li", {}, swatch(symbol(space), "currentColor"), space)),
    element("li", {}, "— Pareto front: no ranked run is both better and cheaper"),
    group.ranked < group.methods.length ? element("li", {}, "hollow: not ranked") : null,
  );
}

function lineLegend(lines) {
  return element("ul", { class: "legend" }, ...lines.map((line, i) => element("li", {}, swatch("square", PALETTE[i % PALETTE.length]), line.run)));
}

// -- sections -------------------------------------------------------------------------------------------------------------------

function groupPart(section, group) {
  const caption = `${section.title}, ${group.heading.toLowerCase()}`;
  const figures = group.plots.map((plot) => figure(`${group.score} and ${COST_TITLES[plot.column]}`, (matching) => scatter(group, plot, matching)));
  const table = sortableTable(group.table, caption, PAGE_ROWS, (rows) => figures.forEach((each) => each.redraw(rows)));
  const cut = group.plots.find((plot) => plot.of > plot.drawn.length);
  return [
    element("h3", {}, group.heading),
    table,
    ...group.notes.map((note) => element("p", { class: "note" }, note)),
    ...judgesPart(group, caption),
    figures.length ? element("div", { class: "plots" }, ...figures.map((each) => each.node)) : null,
    figures.length ? legend(group) : null,
    cut ? element("p", { class: "note" }, `Drawn: the ${cut.drawn.length} best of ${cut.of} rows, and the whole Pareto front.`) : null,
    ...group.matched.map((each) => folded(each.title, element("p", { class: "note" }, each.note), plainTable(each, `${caption}, ${each.title}`))),
    trainingPart(group),
  ];
}

/** What each judge says alone, and how far judges agree. */
function judgesPart(group, caption) {
  return group.judges.flatMap((each) => [element("h4", {}, each.title), element("p", { class: "note" }, each.note), plainTable(each, `${caption}, ${each.title}`, [0])]);
}

function trainingPart(group) {
  const scores = group.scores.map((chart) => figure(`${group.score} while training`, () => lineChart(chart, `${group.score} ↓`, true)).node);
  const losses = group.losses.length ? [figure("Training loss", () => lineChart({ label: "images seen", lines: group.losses }, "loss", false)).node] : [];
  if (!scores.length && !losses.length) return null;
  return folded(
    "Training curves",
    element("p", { class: "note" }, "The best runs of the table. Losses of different methods are on different scales: they show whether a run has settled, not which is better."),
    element("div", { class: "plots" }, ...scores, ...losses),
    lineLegend(losses.length ? group.losses : group.scores[0].lines),
  );
}

function sectionPart(section) {
  return element(
    "section", { id: section.id },
    element("h2", {}, section.title),
    element("p", { class: "hash" }, section.name),
    ...section.notes.map((note) => element("p", { class: "note" }, note)),
    ...section.groups.flatMap((group) => groupPart(section, group)).filter(Boolean),
    section.protocol ? folded("The protocol, whose hash this is", element("pre", { tabindex: "0" }, section.protocol)) : null,
  );
}

function gridFigure({ src, width, height, method, run, score }) {
  const image = () => element("img", { src, width, height, alt: `Samples of ${method}: one row a class`, loading: "lazy" });
  const caption = () => element("figcaption", {}, method, element("small", {}, [run, score].filter(Boolean).join(" · ")));
  const open = element("button", { type: "button", "aria-label": `Enlarge the samples of ${method}` }, image());
  open.addEventListener("click", () => {
    const dialog = document.getElementById("zoom");
    dialog.querySelector("figure").replaceChildren(image(), caption());
    dialog.showModal();
  });
  return element("figure", {}, open, caption());
}

function gridsPart() {
  if (!data.grids.length) return null;
  return element(
    "section", { id: "samples" },
    element("h2", {}, "Samples, side by side"),
    element("p", { class: "note" }, "The best run of each method. All grids start from the same noise and the same labels; none is picked by hand."),
    ...data.grids.flatMap(({ title, figures }) => [element("h3", {}, title), element("div", { class: "grids" }, ...figures.map(gridFigure))]),
  );
}

function claimPart(claim) {
  const texts = claim.table.headers.flatMap((_, i) => (claim.table.cells.every((row) => /^[-\d.,±e+ ]*$/.test(row[i] ?? "")) ? [] : [i]));
  const picture = claim.picture && element("img", { src: claim.picture[0], width: claim.picture[1], height: claim.picture[2], alt: `Figure of ${claim.name}`, loading: "lazy" });
  return element(
    "article", { class: "claim" },
    element("h3", {}, `${claim.name}: ${claim.verdict}`),
    element("p", {}, claim.statement),
    element("p", { class: "note" }, `${claim.paper}; ${claim.budget}`),
    claim.amended ? element("p", { class: "note" }, `Amended after numbers had been seen: ${claim.amended}`) : "",
    plainTable(claim.criteria, `Criteria of ${claim.name}`, [0, 3]),
    folded("How it was checked, and everything that was measured", element("p", {}, claim.setting), ...claim.remarks.map((text) => element("p", {}, text)), plainTable(claim.table, `Measurements of ${claim.name}`, texts)),
    picture,
  );
}

function claimsPart() {
  if (!data.claims.length) return null;
  return element(
    "section", { id: "claims" },
    element("h2", {}, "Claims of the papers, checked here"),
    element("p", { class: "note" }, "Criteria were written before the first run; a claim that was changed after numbers had been seen says so. A verdict follows where the 95 % interval of every estimate lies on one side of its bound."),
    ...data.claims.map(claimPart),
  );
}

function publishedPart() {
  if (!data.published.length) return null;
  return element(
    "section", { id: "published" },
    element("h2", {}, "Published, not measured here"),
    element("p", { class: "note" }, data.publishedNote),
    ...data.published.flatMap(({ resolution, table }) => [element("h3", {}, `${resolution} px`), sortableTable(table, `Published results at ${resolution} px`, PUBLISHED_ROWS)]),
  );
}

function leftOutPart() {
  if (!data.leftOut.length) return null;
  return element("section", { id: "left-out" }, element("h2", {}, "Left out"), element("ul", { class: "reasons" }, ...data.leftOut.map((reason) => element("li", {}, reason))));
}

// -- the page -------------------------------------------------------------------------------------------------------------------

function navigation(parts) {
  const rows = new Map(data.sections.map((section) => [section.id, section.groups.reduce((sum, group) => sum + group.table.rows.length, 0)]));
  return parts.map((part) => {
    const count = rows.has(part.id) ? element("small", {}, ` ${rows.get(part.id)}`) : null;
    return element("a", { href: `#${part.id}` }, part.querySelector("h2").textContent, count);
  });
}

function applyFilter(text) {
  for (const { table, redraw } of tables) {
    table.search(text).draw();
    redraw(text ? new Set(table.rows({ search: "applied" }).indexes().toArray()) : null);
  }
}

function showColumns(all) {
  document.body.classList.toggle("all", all);
  for (const { table, columns } of tables) table.columns(columns.flatMap((column, i) => (column.essential ? [] : [i]))).visible(all);
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

/** The choice outlives the page where the browser allows it; a file opened from a disk may have no storage. */
function stored(write) {
  try {
    return write ? localStorage.setItem("pixlat-theme", write) : localStorage.getItem("pixlat-theme");
  } catch {
    return null;
  }
}

function start() {
  const parts = [...data.sections.map(sectionPart), gridsPart(), claimsPart(), publishedPart(), leftOutPart()].filter(Boolean);
  const main = document.getElementById("main");
  main.replaceChildren(...(data.rows ? [] : [element("p", {}, "No records.")]), ...parts);
  document.querySelector("nav").append(...navigation(parts));
  whenAttached.forEach((begin) => begin());

  setTheme(stored() || (isDark() ? "dark" : "light"));
  document.getElementById("theme").addEventListener("click", () => {
    setTheme(isDark() ? "light" : "dark");
    stored(document.documentElement.dataset.theme);
  });
  document.getElementById("columns").addEventListener("click", ({ currentTarget }) => {
    const all = currentTarget.getAttribute("aria-pressed") !== "true";
    currentTarget.setAttribute("aria-pressed", all);
    showColumns(all);
  });
  let waiting;
  document.getElementById("filter").addEventListener("input", ({ target }) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => applyFilter(target.value.trim()), 120);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === " " && event.target.matches(".dt-column-order")) {
      event.preventDefault();
      event.target.click();
    }
  });
  document.body.dataset.ready = "true";
}

start();
