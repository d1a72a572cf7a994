// Draws every chart of the page, again when the reader's theme changes and before printing.
const charts = JSON.parse(document.getElementById("charts").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
// Colours that are told apart with any kind of colour vision: cividis for what is ordered, Okabe and Ito's for the rest.
const OKABE_ITO = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999"];

function config(isDark) {
  const ink = isDark ? "#e6e6e6" : "#1c1c1c";
  const faint = isDark ? "#444444" : "#dddddd";
  return {
    background: "transparent",
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: { labelColor: ink, titleColor: ink, gridColor: faint, domainColor: faint, tickColor: faint, labelLimit: 160 },
    legend: { labelColor: ink, titleColor: ink, labelLimit: 260 },
    range: { category: OKABE_ITO, ordinal: { scheme: "cividis", extent: [0.95, 0.05] } },
    bar: { color: OKABE_ITO[0] },
    text: { color: ink },
  };
}

async function draw(isDark) {
  for (const [id, spec] of Object.entries(charts)) {
    const options = { renderer: "svg", actions: false, config: config(isDark), tooltip: { theme: isDark ? "dark" : "light" } };
    await vegaEmbed("#" + id, spec, options);
  }
  document.documentElement.dataset.drawn = Object.keys(charts).length;
}

dark.addEventListener("change", () => draw(dark.matches));
window.addEventListener("beforeprint", () => draw(false));
window.addEventListener("afterprint", () => draw(dark.matches));
draw(dark.matches);
