"use strict";
// Draws the charts that a page states in data-charts, and keeps them as parts of the page are fetched again.

const drawn = new Map(); // place and number -> {plot, figure, says, shape}

function colour(number) {
  return getComputedStyle(document.documentElement).getPropertyValue(number ? `--chart-${number}` : "--soft").trim();
}

function shown(scale, value) {
  if (value === null || value === undefined) return "–";
  return scale === "share" ? `${(100 * value).toFixed(1)}%` : Number(value.toPrecision(4)).toString();
}

function clock(seconds) {
  return new Date(1000 * seconds).toISOString().slice(0, 16).replace("T", " ");
}

function heights(scale) {
  if (scale === "share") return { range: [0, 1] };
  if (scale === "log") return { distr: 3, log: 10 };
  if (scale === "count") return { range: (_, low, high) => [0, Math.max(1, high * 1.1)] };
  return { range: { min: { pad: 0.1, soft: 0, mode: 1 }, max: { pad: 0.1 } } };
}

function options(chart, width) {
  const time = chart.x === "time";
  const one = chart.at.length === 1 && (time ? 600 : 1); // so much on both sides of a single point
  const axis = { stroke: () => colour(0), grid: { stroke: () => `${colour(0)}33`, width: 1 }, ticks: { show: false } };
  const numbers = (_, ticks) => ticks.map((tick) => (tick === null || (chart.scale === "count" && tick % 1) ? "" : chart.scale === "share" ? `${Math.round(100 * tick)}%` : shown(chart.scale, tick)));
  const few = chart.at.length < 40;
  return {
    width, height: 240, tzDate: (seconds) => uPlot.tzDate(new Date(1000 * seconds), "Etc/UTC"),
    scales: { x: one ? { time, range: [chart.at[0] - one, chart.at[0] + one] } : { time }, y: heights(chart.scale) },
    axes: [
      { ...axis, label: time ? "time, UTC" : chart.x, labelSize: 20, size: time ? 44 : 36 },
      { ...axis, label: chart.y, labelSize: 20, size: 56, values: numbers },
    ],
    cursor: { y: false },
    series: [
      { label: chart.x, value: (_, value) => value === null || value === undefined ? "–" : time ? clock(value) : String(value) },
      ...chart.lines.map((each) => ({
        label: each.label, stroke: () => colour(each.colour), width: 2, dash: each.dashed ? [6, 4] : undefined,
        spanGaps: !time,
        points: { fill: () => getComputedStyle(document.documentElement).getPropertyValue("--card").trim(), show: few && each.colour > 0, size: 6 },
        value: (_, value) => shown(chart.scale, value),
      })),
    ],
  };
}

function draw(place, chart, key) {
  const data = [chart.at, ...chart.lines.map((each) => each.values)];
  const shape = JSON.stringify([chart.title, chart.x, chart.lines.map((each) => each.label), Math.min(2, chart.at.length), chart.at.length < 40]);
  const known = drawn.get(key);
  if (known && known.shape === shape) {
    if (known.figure.parentNode !== place) place.append(known.figure);
    known.plot.setData(data);
    known.says.textContent = chart.says;
    return;
  }
  if (known) {
    known.plot.destroy();
    known.figure.remove();
  }
  const figure = document.createElement("figure");
  const caption = figure.appendChild(document.createElement("figcaption"));
  const says = document.createElement("p");
  caption.textContent = chart.title;
  says.className = "for-readers";
  says.textContent = chart.says;
  figure.append(says);
  const box = figure.appendChild(document.createElement("div"));
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", chart.title);
  place.append(figure);
  const plot = new uPlot(options(chart, box.clientWidth), data, box);
  new ResizeObserver(() => {
    if (box.clientWidth && box.clientWidth !== plot.width) plot.setSize({ width: box.clientWidth, height: plot.height });
  }).observe(box);
  drawn.set(key, { plot, figure, says, shape });
}

function drawAll() {
  for (const place of document.querySelectorAll("[data-charts]")) {
    JSON.parse(place.dataset.charts).forEach((chart, number) => draw(place, chart, `${place.id} ${number}`));
  }
}

document.addEventListener("htmx:afterSwap", drawAll);
document.addEventListener("htmx:oobAfterSwap", drawAll);
// What has not changed stays as it is, so that a text that somebody selects or reads is not taken away.
document.addEventListener("htmx:oobBeforeSwap", (event) => {
  const made = event.detail.fragment.firstElementChild, old = event.detail.target;
  if (!made) return;
  const same = made.dataset.charts ? made.dataset.charts === old.dataset.charts : made.innerHTML === old.innerHTML;
  if (same) event.detail.shouldSwap = false;
});
function inOtherColours() {
  for (const { plot, figure } of drawn.values()) {
    plot.destroy();
    figure.remove();
  }
  drawn.clear();
  drawAll();
}
document.addEventListener("themechange", inOtherColours);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", inOtherColours);
drawAll();
