// Draws the charts of monitoring/_charts.html with uPlot. A moment without a value is a hole, shaded and named.
"use strict";

const COLOURS = ["#066fd1", "#d6336c", "#2fb344", "#f59f00", "#7048e8", "#0ca678", "#e8590c", "#4263eb", "#74b816", "#ae3ec9"];
const REFRESH_MS = { "1h": 30_000, "6h": 60_000, "1d": 120_000, "7d": 900_000, "30d": 900_000 };
const MOST_GAPS = 6;

// How a number is told, by unit. Null is unknown, and never 0.
const scaled = (units, base) => (value) => {
  let index = 0;
  while (Math.abs(value) >= base && index < units.length - 1) { value /= base; index += 1; }
  return `${Number(value.toPrecision(3))} ${units[index]}`;
};
const UNITS = {
  percent: (value) => `${Number(value.toPrecision(3))} %`,
  celsius: (value) => `${Math.round(value)} °C`,
  watts: scaled(["W", "kW", "MW"], 1000),
  hertz: scaled(["Hz", "kHz", "MHz", "GHz"], 1000),
  bytes_per_second: scaled(["B/s", "kB/s", "MB/s", "GB/s"], 1000),
  count: (value) => String(Math.round(value)),
};
const told = (unit, value) => (value == null ? "—" : UNITS[unit](value));

const clock = (seconds, isLong) => {
  const text = new Date(seconds * 1000).toISOString();
  return isLong ? `${text.slice(5, 10)} ${text.slice(11, 16)}` : text.slice(11, 16);
};

// Hours within a day, dates beyond it; at midnight the date, so that one knows which day the hours are of.
const ticksOf = (_plot, ticks, _axis, _space, apart) => ticks.map((at) => {
  const text = new Date(at * 1000).toISOString();
  return apart >= 86_400 || at % 86_400 === 0 ? text.slice(5, 10) : text.slice(11, 16);
});

// Shades each gap where all lines have none, so that a hole is seen to be one.
const shade = (chart) => (plot) => {
  const { ctx, bbox } = plot;
  const half = chart.step_s / 2;
  ctx.save();
  ctx.fillStyle = "rgba(128, 128, 128, .14)";
  for (const gap of chart.lines[0].gaps) {
    const isOfAll = chart.lines.every((line) => line.gaps.some((each) => each.from <= gap.from && each.to >= gap.to));
    if (!isOfAll) continue;
    const [left, right] = [gap.from - half, gap.to + half].map((at) => plot.valToPos(at, "x", true));
    ctx.fillRect(Math.max(left, bbox.left), bbox.top, Math.min(right, bbox.left + bbox.width) - Math.max(left, bbox.left), bbox.height);
  }
  ctx.restore();
};

// A value between two holes makes no line: those alone are drawn as points.
const alone = ({ data }, series) => {
  const values = data[series];
  const isHole = (index) => values[index] == null;
  return [...values.keys()].filter((index) => !isHole(index) && isHole(index - 1) && isHole(index + 1));
};

// Every gap once, with the lines that have it.
const gapsOf = (chart, words) => {
  const found = new Map();
  for (const line of chart.lines) {
    for (const gap of line.gaps) {
      const key = `${gap.from} ${gap.to} ${gap.cause}`;
      if (!found.has(key)) found.set(key, { ...gap, lines: [] });
      found.get(key).lines.push(line.name);
    }
  }
  const isLong = chart.times.at(-1) - chart.times[0] > 86_400;
  return [...found.values()].sort((one, other) => other.to - one.to).map((gap) => {
    const who = chart.lines.length === 1 ? "" : ` (${gap.lines.length === chart.lines.length ? words.all : gap.lines.join(", ")})`;
    return `${clock(gap.from, isLong)} – ${clock(gap.to + chart.step_s, isLong)} ${words[gap.cause]}${who}`;
  });
};

const optionsOf = (chart, words, width) => ({
  width,
  height: 200,
  tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), "Etc/UTC"),
  cursor: { sync: { key: "charts" }, drag: { x: false, y: false } },
  legend: { show: chart.lines.length <= COLOURS.length },
  scales: { y: { range: (_plot, low, high) => [Math.min(0, low ?? 0), Math.max(chart.unit === "percent" ? 100 : 1, high ?? 1) * 1.02] } },
  axes: [
    { stroke: "#7b8aa0", grid: { stroke: "rgba(128,128,128,.15)" }, values: ticksOf },
    { stroke: "#7b8aa0", grid: { stroke: "rgba(128,128,128,.15)" }, size: 72, values: (_plot, ticks) => ticks.map((tick) => told(chart.unit, tick)) },
  ],
  series: [
    { label: "UTC", value: (_plot, at) => (at == null ? "—" : clock(at, true)) },
    ...chart.lines.map((line, index) => ({
      label: words[line.name] ?? line.name,
      stroke: COLOURS[index % COLOURS.length],
      width: 1.5,
      spanGaps: false,
      points: { show: false, filter: alone, size: 5, fill: COLOURS[index % COLOURS.length] },
      value: (_plot, value) => told(chart.unit, value),
    })),
  ],
  hooks: { drawClear: [shade(chart)] },
});

class Charts {
  constructor(root) {
    this.root = root;
    this.address = root.dataset.charts;
    this.words = JSON.parse(root.dataset.words);
    this.range = root.querySelector("[data-range].active").dataset.range;
    this.gpu = "";
    this.turn = 0; // what was asked for before a change is not drawn after it
    this.plots = new Map();
    this.visible = new Set();
    this.cards = [...root.querySelectorAll("[data-chart]")];
    root.addEventListener("click", (event) => this.choose(event.target.closest("[data-range]")));
    root.addEventListener("change", (event) => { if (event.target.matches("[data-gpu]")) this.chooseGpu(event.target.value); });
    this.watching = new IntersectionObserver((entries) => this.seen(entries), { rootMargin: "200px" });
    this.cards.forEach((card) => this.watching.observe(card));
    new ResizeObserver(() => this.fit()).observe(root);
    this.schedule();
  }

  choose(button) {
    if (!button) return;
    this.range = button.dataset.range;
    for (const each of this.root.querySelectorAll("[data-range]")) {
      each.classList.toggle("active", each === button);
      each.setAttribute("aria-pressed", String(each === button));
    }
    this.again();
  }

  chooseGpu(uuid) {
    this.gpu = uuid;
    this.root.querySelectorAll("[data-of-host]").forEach((column) => { column.hidden = uuid !== ""; });
    this.again();
  }

  schedule() {
    setTimeout(() => {
      if (document.visibilityState === "visible") this.again();
      this.schedule();
    }, REFRESH_MS[this.range]);
  }

  seen(entries) {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) this.visible.delete(target);
      else if (!this.visible.has(target)) { this.visible.add(target); this.load(target, this.turn); }
    }
  }

  again() {
    this.turn += 1;
    this.visible.forEach((card) => this.load(card, this.turn));
  }

  async load(card, turn) {
    const asked = new URLSearchParams({ measure: card.dataset.chart, range: this.range });
    if (this.gpu) asked.set("gpu", this.gpu);
    const answer = await fetch(`${this.address}?${asked}`).then((response) => (response.ok ? response.json() : null)).catch(() => null);
    if (turn !== this.turn || answer === null) return; // it stays as it was, and is asked for again
    const trouble = this.root.querySelector("[data-trouble]");
    trouble.hidden = !answer.trouble;
    trouble.textContent = answer.trouble ?? "";
    if (!answer.trouble) this.draw(card, answer);
  }

  draw(card, chart) {
    const place = card.querySelector(".chart");
    const isEmpty = !chart.lines.some((line) => line.values.some((value) => value !== null));
    this.plots.get(card)?.destroy();
    this.plots.delete(card);
    card.querySelector("[data-empty]").hidden = !isEmpty;
    if (!isEmpty) {
      const data = [chart.times, ...chart.lines.map((line) => line.values)];
      this.plots.set(card, new uPlot(optionsOf(chart, this.words, place.clientWidth), data, place));
    }
    card.dataset.drawn = `${chart.measure} ${this.range} ${this.gpu}`;
    this.tellGaps(card, chart.times.length ? gapsOf(chart, this.words) : []);
  }

  tellGaps(card, gaps) {
    const list = card.querySelector("[data-gaps]");
    const shown = gaps.length > MOST_GAPS ? [...gaps.slice(0, MOST_GAPS), `… ${this.words.more} (${gaps.length - MOST_GAPS})`] : gaps;
    list.replaceChildren(...shown.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
  }

  fit() {
    for (const [card, plot] of this.plots) {
      const width = card.querySelector(".chart").clientWidth;
      if (width && width !== plot.width) plot.setSize({ width, height: 200 });
    }
  }
}

document.querySelectorAll("[data-charts]").forEach((root) => new Charts(root));
