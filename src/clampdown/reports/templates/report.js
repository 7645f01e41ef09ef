"use strict";
(() => {
  const root = document.documentElement;
  const specs = JSON.parse(document.getElementById("figure-data").textContent);

  /* "@name" and "@name/opacity" become the style sheet's colours, anywhere in a specification. */
  const colours = () => {
    const style = getComputedStyle(root);
    return (token) => {
      const [name, alpha] = token.slice(1).split("/");
      const hex = style.getPropertyValue("--" + name).trim();
      if (!alpha) return hex;
      const part = (i) => parseInt(hex.slice(i, i + 2), 16);
      return `rgba(${part(1)},${part(3)},${part(5)},${alpha})`;
    };
  };
  const isToken = (value) => typeof value === "string" && /^@[a-z0-9-]+(\/[0-9.]+)?$/.test(value);
  const resolve = (value, colour) => {
    if (isToken(value)) return colour(value);
    if (Array.isArray(value)) return value.map((item) => resolve(item, colour));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item, colour)]));
    }
    return value;
  };

  const axis = (own, narrow) => ({
    gridcolor: "@grid", linecolor: "@ink-soft", zeroline: false, showline: true, ticks: "outside", ticklen: 4,
    tickcolor: "@ink-soft", automargin: true, fixedrange: true, ...own,
    title: { standoff: 8, ...own.title, font: { size: 12 } }, tickfont: { size: narrow ? 11 : 12 },
  });
  const layout = (own, narrow) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false, hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "@ink" },
    margin: { l: 44, r: 12, t: 22, b: 40 },
    legend: { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom", font: { size: 12 }, itemsizing: "trace" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: "@ink-soft", activecolor: "@ink" },
    hoverlabel: { bgcolor: "@panel", bordercolor: "@rule", font: { color: "@ink", size: 12 }, align: "left" },
    ...own, xaxis: axis(own.xaxis, narrow), yaxis: axis(own.yaxis, narrow),
  });
  const config = {
    displaylogo: false, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false, responsive: true, scrollZoom: false, showTips: false,
    modeBarButtons: [["toImage"]], toImageButtonOptions: { scale: 3 },
  };
  /* On paper two figures of this many pixels stand side by side on A4 and on letter. */
  const PAPER = { width: 324, height: 360 };
  const draw = (size) => {
    const colour = colours();
    for (const [id, spec] of Object.entries(specs)) {
      const element = document.getElementById(id);
      const drawn = layout({ ...spec.layout, ...size }, size !== undefined || element.clientWidth < 480);
      const shown = resolve({ data: spec.data, layout: drawn }, colour);
      Plotly.react(element, shown.data, shown.layout, { ...config, toImageButtonOptions: { scale: 3, filename: id } });
    }
  };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  addEventListener("beforeprint", () => { root.dataset.theme = "light"; draw(PAPER); });
  addEventListener("afterprint", () => {
    delete root.dataset.theme;
    Object.keys(specs).forEach((id) => Plotly.purge(id)); // or the paper's width would stay
    draw();
  });

  /* Sorting: numbers by value, text by letters, cells without data last whichever way. */
  const key = (row, column) => {
    const value = row.cells[column].dataset.sort;
    return value === undefined || value === "" ? null : isNaN(value) ? value : Number(value);
  };
  const compare = (a, b) => (typeof a === typeof b && typeof a === "number" ? a - b : String(a).localeCompare(String(b)));
  const sort = (table, header) => {
    const down = header.getAttribute("aria-sort") === "descending" || (!header.hasAttribute("aria-sort") && header.classList.contains("text"));
    const sign = down ? 1 : -1;
    table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", down ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].map((row) => [key(row, header.cellIndex), row]);
    rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  };
  document.querySelectorAll("table.sortable").forEach((table) => {
    table.addEventListener("click", (event) => {
      const button = event.target.closest("th button");
      if (button) sort(table, button.closest("th"));
    });
  });
})();
