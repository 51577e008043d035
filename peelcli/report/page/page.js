"use strict";
// Draws the charts and makes the tables live. All text comes from the report's data and goes in as text, never as HTML.
(() => {
  const VERDICTS = ["broken", "surpassed", "matched", "undecided", "effective"];
  const BAND = { red: "rgba(214,60,60,.16)", yellow: "rgba(235,175,40,.20)", green: "rgba(60,165,80,.16)" };
  const CONFIG = { responsive: true, displayModeBar: false };
  const MOST_MAPS = 40;
  const byId = (id) => document.getElementById(id);
  const number = (text) => (text === null || text === "-" ? null : parseFloat(text));
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // Plotly reads tags in its labels: they are spelt out.
  const label = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  let data, columns, run, layer = null, pinned = false, printing = false;

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text.trim()), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }

  function column(at, name) {
    return data.runs[at].cells[columns[name]];
  }

  function row(at, number) {
    return column(at, "layer").indexOf(String(number));
  }

  // -- what every chart has ------------------------------------------------------------------------------------------

  function layout(extra) {
    const axis = { gridcolor: style("--line"), zeroline: false, zerolinecolor: style("--dim"), automargin: true };
    const { xaxis = {}, yaxis = {}, ...rest } = extra;
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: style("--text"), size: 12 },
      margin: { l: 56, r: 12, t: 12, b: 44 }, hovermode: "closest", hoverlabel: { align: "left" },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
      ...(printing ? { width: 680, autosize: false } : { autosize: true }),
      xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
    };
  }

  function checkpoints() {
    const count = data.runs.length, every = Math.ceil(count / 12);
    const shown = [...Array(count).keys()].filter((at) => at % every === 0);
    return {
      title: { text: data.runs.every((r) => r.step !== null) ? "training step" : "checkpoint" },
      tickvals: shown, ticktext: shown.map((at) => label(data.runs[at].label)), range: [-0.6, count - 0.4],
    };
  }

  // What a call makes is drawn over what was there; the handlers are set once.
  function draw(id, traces, extra, handlers = {}) {
    const node = byId(id);
    if (!node) return;
    const fresh = !node.data;
    Plotly.react(node, traces, layout(extra), CONFIG);
    if (fresh) for (const [event, handle] of Object.entries(handlers)) node.on(event, handle);
  }

  // -- the loss among its bounds -------------------------------------------------------------------------------------

  function cloud() {
    const runs = data.runs, at = runs.map((_, index) => index);
    const values = (name) => runs.map((r) => r[name]);
    const bounded = at.filter((index) => runs[index].yes !== null);
    const points = runs.flatMap((r, index) => r.maps.map(([map, ce]) => [index, ce, map]));
    const all = ["ce", "control", "last", "yes"].flatMap(values).filter((v) => v !== null);
    if (!all.length) return;
    const cap = Math.max(...all), low = Math.min(...all), pad = Math.max((cap - low) * 0.12, 0.01);
    const traces = [];
    if (bounded.length) {
      // Bands: each reaches half a checkpoint beyond the first and the last, so that one alone has them, too.
      const first = bounded[0], end = bounded[bounded.length - 1];
      const x = [first - 0.5, ...bounded, end + 0.5];
      const stretch = (value) => [first, ...bounded, end].map((index) => value(runs[index]));
      const yes = (r) => (r.last === null ? r.yes : Math.min(r.yes, r.last));
      const levels = [
        [null, () => low - 2 * pad], ["green", yes], ["yellow", (r) => (r.last === null ? cap + 2 * pad : r.last)],
        ["red", () => cap + 2 * pad],
      ];
      for (const [zone, value] of levels) traces.push({
        x, y: stretch(value), mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false,
        ...(zone ? { fill: "tonexty", fillcolor: BAND[zone] } : {}),
      });
    }
    const line = (name, title, extra) => ({ x: at, y: values(name), name: title, mode: "lines", ...extra });
    traces.push({
      x: points.map((p) => p[0]), y: points.map((p) => p[1]), text: points.map((p) => label(p[2])), mode: "markers",
      name: "peeled paths", marker: { size: 4, color: style("--dim"), opacity: 0.55 },
      hovertemplate: "map %{text}<br>CE %{y:.4f}<extra></extra>",
    });
    if (bounded.length) traces.push(
      line("last", "last target", { line: { color: style("--red"), width: 1 } }),
      line("yes", "YES bound", { line: { color: style("--yellow"), width: 1.5 } }),
      line("least", "least so far", { line: { color: style("--text"), width: 1, dash: "dot", shape: "hv" } }),
      line("control", "trained blocks, refitted head", { line: { color: style("--dim"), width: 1, dash: "dash" } }),
    );
    traces.push(line("ce", "loss", {
      mode: "lines+markers", line: { color: style("--accent"), width: 2 },
      marker: { size: 8, color: runs.map((r) => style(r.zone ? `--${r.zone}` : "--accent")), line: { width: 1, color: style("--card") } },
      text: runs.map((r) => `${label(r.name)}<br>${r.zone ? `${r.zone} zone` : "no zone"}`),
      hovertemplate: "%{text}<br>CE %{y:.4f}<extra></extra>",
    }));
    const y = { title: { text: "CE, nats per token" }, range: [low - pad, cap + pad] };
    draw("cloud", traces, { xaxis: checkpoints(), yaxis: y }, { plotly_click: (e) => choose(Math.round(e.points[0].x)) });
  }

  // -- layers and checkpoints ----------------------------------------------------------------------------------------

  function heat() {
    if (!byId("heat")) return;
    const by = byId("colour").value, rows = data.layers, each = Math.ceil(rows.length / 24);
    byId("heat").style.height = `${Math.min(720, Math.max(200, 90 + 14 * rows.length))}px`;
    const cell = (at, number, name) => {
      const index = row(at, number);
      return index < 0 ? null : column(at, name)[index];
    };
    const grid = (read) => rows.map((number) => data.runs.map((_, at) => read(at, number)));
    const verdicts = by === "verdict";
    const z = grid((at, n) => {
      const found = cell(at, n, by);
      return found === null ? null : verdicts ? VERDICTS.indexOf(found) : number(found);
    });
    const text = grid((at, n) => {
      const flagged = data.runs[at].flagged.includes(n) ? " (flagged)" : "";
      const what = cell(at, n, "verdict");
      return `layer ${n}, ${label(data.runs[at].name)}<br>${what === null ? "not audited" : what}${flagged}` +
        (what === null ? "" : `<br>gap ${cell(at, n, "gap")}, ${label(cell(at, n, "decided by"))}`);
    });
    const finite = z.flat().filter(Number.isFinite).map(Math.abs).sort((a, b) => a - b);
    const top = finite.length ? finite[Math.floor((finite.length - 1) * 0.95)] || 1 : 1;
    const steps = VERDICTS.flatMap((name, i) => [[i / 5, style(`--${name}`)], [(i + 1) / 5, style(`--${name}`)]]);
    const signed = by === "gap" || by === "score";
    const scale = verdicts ? { zmin: -0.5, zmax: 4.5, colorscale: steps, showscale: false }
      : { zmin: signed ? -top : 0, zmax: top, colorscale: signed ? "RdBu" : "Viridis", reversescale: signed,
        colorbar: { thickness: 10 } };
    const marks = data.runs.flatMap((r, at) => r.flagged.filter((n) => rows.includes(n)).map((n) => [at, rows.indexOf(n)]));
    const gap = data.runs.length <= 60 ? 1 : 0;
    const traces = [
      { type: "heatmap", x: data.runs.map((_, at) => at), y: rows.map((_, i) => i), z, text, hoverinfo: "text", xgap: gap, ygap: gap, ...scale },
      { x: marks.map((m) => m[0]), y: marks.map((m) => m[1]), mode: "markers", hoverinfo: "skip",
        marker: { symbol: "x-thin", size: 6, line: { width: 1.5, color: style("--card") } } },
    ];
    const named = rows.map((_, i) => i).filter((i) => i % each === 0);
    const x = { ...checkpoints(), showgrid: false };
    const y = { title: { text: "layer" }, range: [rows.length - 0.5, -0.5], showgrid: false, tickvals: named,
      ticktext: named.map((i) => rows[i]) };
    const at = (e) => e.points.find((p) => p.data.type === "heatmap");
    draw("heat", traces, { xaxis: x, yaxis: y, showlegend: false }, {
      plotly_hover: (e) => { const p = at(e); if (p && !pinned) detail(p.x, rows[p.y]); },
      plotly_click: (e) => { const p = at(e); if (p) { choose(p.x); pin(p.x, rows[p.y]); } },
    });
  }

  // -- one checkpoint ------------------------------------------------------------------------------------------------

  function maps() {
    if (!byId("maps")) return;
    const { maps: all, ce, control, name } = data.runs[run];
    byId("maps-title").textContent = `Peeled paths of ${name}`;
    const best = [...all].sort((a, b) => a[1] - b[1]);
    const shown = best.slice(0, MOST_MAPS).reverse(), floor = Math.min(ce, control ?? ce);
    byId("maps-note").textContent = all.length > MOST_MAPS ? `The ${MOST_MAPS} lowest of ${all.length}.` : "";
    const lines = [[ce, "--accent", "as trained"], [control, "--dim", "head"]].filter(([value]) => value !== null);
    draw("maps", [{
      x: shown.map((m) => m[1]), y: shown.map((_, index) => index), text: shown.map((m) => label(m[0])), mode: "markers",
      marker: { size: 8, color: shown.map((m) => style(m[1] < floor ? "--red" : "--green")),
        symbol: shown.map((m) => (m[2] ? "circle" : "circle-open")) },
      hovertemplate: "map %{text}<br>CE %{x:.4f}<extra></extra>",
    }], {
      xaxis: { title: { text: "CE, nats per token" } },
      yaxis: { tickvals: shown.map((_, index) => index), showgrid: false,
        ticktext: shown.map((m) => label(m[0].length > 24 ? `${m[0].slice(0, 23)}...` : m[0])) },
      shapes: lines.map(([value, colour]) => ({ type: "line", x0: value, x1: value, y0: 0, y1: 1, yref: "paper",
        line: { color: style(colour), dash: "dash", width: 1.5 } })),
      annotations: lines.map(([value, colour, text], index) => ({ x: value, y: 1 - 0.07 * index, yref: "paper", text,
        showarrow: false, xanchor: "left", font: { color: style(colour) } })),
      showlegend: false,
    });
  }

  function intervals(id, at, numbers, x, extra, onClick) {
    const rows = at.map((index, i) => [index, row(index, numbers[i])]).map(([a, r], i) => [a, r, x[i]]).filter(([, r]) => r >= 0);
    const read = (name) => rows.map(([a, r]) => column(a, name)[r]);
    const gaps = read("gap").map(number);
    const span = (name, sign) => read(name).map((v, i) => (v === "-" || gaps[i] === null ? 0 : Math.max(0, sign * (number(v) - gaps[i]))));
    draw(id, [{
      x: rows.map((r) => r[2]), y: gaps, mode: "markers", text: read("verdict"),
      marker: { size: 7, color: read("verdict").map((v) => style(`--${v}`)) },
      error_y: { type: "data", symmetric: false, array: span("high", 1), arrayminus: span("low", -1), thickness: 1,
        color: style("--dim") },
      hovertemplate: "%{text}<br>gap %{y:.4f}<extra></extra>",
    }], { yaxis: { title: { text: "gap, nats per token" }, zeroline: true }, showlegend: false, ...extra }, { plotly_click: onClick });
  }

  function gaps() {
    if (!byId("gaps")) return;
    const numbers = column(run, "layer").map(Number);
    byId("gaps-title").textContent = `Gaps of ${data.runs[run].name}`;
    intervals("gaps", numbers.map(() => run), numbers, numbers, { xaxis: { title: { text: "layer" } } },
      (e) => pin(run, e.points[0].x));
  }

  function history() {
    if (!byId("history") || layer === null) return;
    const at = data.runs.map((_, index) => index);
    byId("history-title").textContent = `Layer ${layer} over the checkpoints`;
    intervals("history", at, at.map(() => layer), at, { xaxis: checkpoints() }, (e) => pin(Math.round(e.points[0].x), layer));
  }

  function element(tag, text, kind) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }

  function fill(node, ...children) {
    node.replaceChildren(...children);
  }

  // The rows of a checkpoint, as the report itself has written those of the newest.
  function table() {
    const body = byId("layers").tBodies[0], { cells, flagged } = data.runs[run];
    fill(body, ...cells[0].map((_, index) => {
      const made = element("tr");
      data.columns.forEach(([name, kind], at) => {
        const text = cells[at][index], isLayer = name === "layer";
        const mark = isLayer && flagged.includes(Number(text)) ? "! " : "";
        made.append(element("td", mark + text, name === "verdict" ? text : mark ? `${kind} flagged` : kind));
      });
      return made;
    }));
    byId("layers-title").textContent = `Layers of ${data.runs[run].name}`;
    alive();
  }

  function alive() {
    for (const made of byId("layers").tBodies[0].rows) {
      const number = Number(made.cells[0].textContent.replace("! ", ""));
      made.tabIndex = 0;
      made.dataset.layer = number;
      made.addEventListener("click", () => pin(run, number));
      made.addEventListener("mouseenter", () => { if (!pinned) detail(run, number); });
      made.addEventListener("keydown", (e) => { if (e.key === "Enter") pin(run, number); });
    }
    sort();
    mark();
  }

  function mark() {
    for (const made of byId("layers").tBodies[0].rows) made.classList.toggle("chosen", Number(made.dataset.layer) === layer);
  }

  let order = null;
  function sort() {
    if (!order) return;
    const [at, down] = order, body = byId("layers").tBodies[0];
    const name = data.columns[at][0], key = (made) => made.cells[at].textContent.replace("! ", "");
    const value = (text) => (name === "verdict" ? VERDICTS.indexOf(text) : name === "decided by" || name === "blame" ? text : number(text));
    const sorted = [...body.rows].map((made) => [value(key(made)), made]);
    const known = (v) => v !== null && !Number.isNaN(v);
    sorted.sort(([a], [b]) => known(b) - known(a) || (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1));
    fill(body, ...sorted.map(([, made]) => made));
    [...byId("layers").tHead.rows[0].cells].forEach((head, index) => {
      if (index === at) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
  }

  // -- one layer -----------------------------------------------------------------------------------------------------

  function detail(at, number) {
    const node = byId("detail"), { name, why, flagged } = data.runs[at], index = row(at, number);
    if (!node || index < 0) return;
    const cell = (what) => column(at, what)[index];
    const verdict = cell("verdict");
    const title = element("h3", `Layer ${number} of ${name}: `);
    title.append(element("span", verdict, verdict), flagged.includes(number) ? " (flagged)" : "");
    const list = element("dl");
    const interval = cell("low") === "-" ? "" : ` (${cell("low")} to ${cell("high")})`;
    for (const [term, text] of [["gap", `${cell("gap")}${interval} nats per token`], ["decided by", cell("decided by")],
      ["blame", cell("blame")], ["bits that suffice", `${cell("bits")} of ${cell("own")}`], ["unexplained", cell("fvu")],
      ["cost of dropping it", cell("drop")]]) list.append(element("dt", term), element("dd", text));
    const said = why[index] === null ? [] : data.texts[why[index]].split("\n").map((text) => element("p", text));
    fill(node, title, ...said, list, ...tried(at, number));
    layer = number;
    mark();
  }

  function tried(at, number) {
    const found = at === data.runs.length - 1 ? data.tried[number] || [] : [];
    if (!found.length) return [];
    const made = element("table"), head = made.createTHead().insertRow(), body = made.createTBody();
    for (const name of data.tried_columns) head.append(element("th", name, name === "reference" || name === "fit" ? "" : "n"));
    for (const cells of found) {
      const line = body.insertRow();
      cells.forEach((text, i) => line.append(element("td", text, i === 0 || i === cells.length - 1 ? "wide" : "n")));
    }
    const box = element("div", undefined, "scroll");
    box.append(made);
    return [element("p", "What was tried:", "dim"), box];
  }

  function pin(at, number) {
    pinned = true;
    detail(at, number);
    history();
    byId("unpin").hidden = false;
  }

  function choose(at) {
    if (at < 0 || at >= data.runs.length || at === run) return;
    run = at;
    byId("run").value = String(at);
    about();
    table();
    maps();
    gaps();
  }

  function about() {
    const { headline, about: lines, said } = data.runs[run], node = byId("about"), list = element("dl");
    for (const [name, text] of lines) list.append(element("dt", name), element("dd", text));
    fill(node, element("p", headline, data.runs[run].bad ? "flagged" : ""), list, ...said.map((text) => element("p", text)));
  }

  function all() {
    cloud();
    heat();
    maps();
    gaps();
    history();
  }

  // -- the page ------------------------------------------------------------------------------------------------------

  function controls() {
    const choice = byId("run");
    data.runs.forEach((r, at) => choice.append(new Option(r.name, String(at))));
    choice.value = String(run);
    choice.addEventListener("change", () => choose(Number(choice.value)));
    byId("colour")?.addEventListener("change", heat);
    byId("unpin")?.addEventListener("click", () => { pinned = false; byId("unpin").hidden = true; });
    byId("theme").addEventListener("click", () => {
      const dark = style("color-scheme") === "dark" || getComputedStyle(document.documentElement).colorScheme === "dark";
      document.documentElement.dataset.theme = dark ? "light" : "dark";
      all();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
    [...byId("layers").tHead.rows[0].cells].forEach((head, at) => {
      const button = element("button", head.textContent);
      fill(head, button);
      button.addEventListener("click", () => { order = [at, order && order[0] === at ? !order[1] : at > 0]; sort(); });
    });
    // Paper is light, and narrower than most windows; charts do not follow it by themselves.
    let theme;
    addEventListener("beforeprint", () => {
      theme = document.documentElement.dataset.theme;
      document.documentElement.dataset.theme = "light";
      printing = true;
      all();
    });
    addEventListener("afterprint", () => {
      if (theme) document.documentElement.dataset.theme = theme;
      else delete document.documentElement.dataset.theme;
      printing = false;
      all();
    });
    for (const node of document.querySelectorAll(".live")) node.hidden = false;
  }

  unpack(byId("data").textContent).then((found) => {
    data = found;
    columns = Object.fromEntries(data.columns.map(([name], at) => [name, at]));
    run = data.runs.length - 1;
    controls();
    alive();
    const worst = data.runs[run].flagged[0] ?? data.layers[0];
    if (worst !== undefined) detail(run, worst);
    all();
    document.documentElement.dataset.ready = "yes";
  }).catch((error) => {
    byId("status").textContent = `The charts cannot be drawn (${error.message}). The tables are complete for the newest checkpoint.`;
    document.documentElement.dataset.ready = "no";
    console.error(error);
  });
})();
