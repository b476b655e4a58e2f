"use strict";
// Draws the curves of runs, and draws them again as they grow.

const drawn = new Map(); // chart's place -> {plot, labels}

function colour(number) {
  return getComputedStyle(document.documentElement).getPropertyValue(number ? `--chart-${number}` : "--soft").trim();
}

function columns(chart) {
  return [chart.steps, ...chart.series.map((each) => each.values)];
}

function options(chart, width) {
  const percent = (value) => `${(100 * value).toFixed(1)}%`;
  const said = chart.kind === "score" ? percent : (value) => Number(value.toPrecision(4)).toString();
  const axis = { stroke: () => colour(0), grid: { stroke: () => `${colour(0)}33`, width: 1 }, ticks: { show: false } };
  return {
    width, height: 240,
    scales: { x: { time: false }, y: chart.kind === "score" ? { range: [0, 1] } : { range: { min: { pad: 0.1, soft: 0, mode: 1 }, max: { pad: 0.1 } } } },
    axes: [{ ...axis, label: "step", labelSize: 20, size: 36 }, { ...axis, size: 56, values: (_, ticks) => ticks.map((tick) => chart.kind === "score" ? `${Math.round(100 * tick)}%` : said(tick)) }],
    cursor: { y: false },
    series: [
      { label: "step" },
      ...chart.series.map((each) => ({
        label: each.label, stroke: () => colour(each.colour), width: 2, dash: each.dashed ? [6, 4] : undefined, spanGaps: true,
        points: { fill: () => getComputedStyle(document.documentElement).getPropertyValue("--card").trim(), show: each.values.filter((value) => value !== null).length < 40, size: 6 },
        value: (_, value) => value === null || value === undefined ? "–" : said(value),
      })),
    ],
  };
}

function draw(place, chart, key) {
  const labels = JSON.stringify([chart.title, chart.series.map((each) => each.label)]);
  const known = drawn.get(key);
  if (known && known.labels === labels) {
    known.plot.setData(columns(chart));
    known.says.textContent = chart.says;
    return;
  }
  if (known) known.figure.remove();
  const figure = document.createElement("figure");
  const caption = figure.appendChild(document.createElement("figcaption"));
  const says = document.createElement("p");
  caption.textContent = chart.title;
  says.className = "for-readers";
  says.textContent = chart.says;
  figure.append(says);
  const box = figure.appendChild(document.createElement("div"));
  box.setAttribute("aria-hidden", "true");
  place.append(figure);
  const plot = new uPlot(options(chart, box.clientWidth), columns(chart), box);
  new ResizeObserver(() => {
    if (box.clientWidth && box.clientWidth !== plot.width) plot.setSize({ width: box.clientWidth, height: plot.height });
  }).observe(box);
  drawn.set(key, { plot, labels, figure, says });
}

let asking = false;
let again = false;

async function drawAll() {
  if (asking) {
    again = true;
    return;
  }
  asking = true;
  try {
    for (const place of document.querySelectorAll("[data-curves]")) {
      const answer = await fetch(place.dataset.curves, { headers: { "HX-Request": "true" } });
      if (!answer.ok) continue; // the next change asks again
      const { charts } = await answer.json();
      if (charts.length) place.querySelector(".none")?.remove();
      charts.forEach((chart, number) => draw(place, chart, number));
    }
  } catch { /* the server went away: the next change asks again */ }
  asking = false;
  if (again) {
    again = false;
    drawAll();
  }
}

document.addEventListener("htmx:afterSwap", (event) => {
  if (event.target.id === "live" || event.detail.target?.id === "live") drawAll();
});
// What has not changed stays as it is, so that a text that somebody selects or reads is not taken away.
document.addEventListener("htmx:oobBeforeSwap", (event) => {
  const made = event.detail.fragment.firstElementChild;
  if (made && made.innerHTML === event.detail.target.innerHTML) event.detail.shouldSwap = false;
});
function inOtherColours() {
  drawn.forEach(({ figure, plot }) => {
    plot.destroy();
    figure.remove();
  });
  drawn.clear();
  drawAll();
}
document.addEventListener("themechange", inOtherColours);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", inOtherColours);
drawAll();
