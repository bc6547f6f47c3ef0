"use strict";
(() => {
  const darkColors = JSON.parse(document.getElementById("dark-colors").textContent);
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const figures = [...document.querySelectorAll("figure.chart")];
  const finger = matchMedia("(pointer: coarse)").matches;
  const config = { responsive: true, displaylogo: false, displayModeBar: false };

  // A copy of a figure with the colours of the dark page: the value of every key about colours.
  function darkened(node, ofColor) {
    if (typeof node === "string") return ofColor && node in darkColors ? darkColors[node] : node;
    if (node === null || typeof node !== "object") return node;
    if (Array.isArray(node)) return node.map((item) => darkened(item, ofColor));
    const entries = Object.entries(node);
    return Object.fromEntries(entries.map(([key, value]) => [key, darkened(value, /color/.test(key))]));
  }

  function draw(figure, dark) {
    const place = figure.querySelector(".plot");
    try {
      const data = JSON.parse(shownScript(figure).textContent);
      const { data: traces, layout } = dark ? darkened(data, false) : data;
      smooth(figure, traces);
      // On a touch screen a finger that scrolls the page must not zoom.
      Plotly.react(place, traces, { ...layout, dragmode: finger ? false : "zoom" }, config);
      if (!place.dataset.ready) keepTicks(place, layout);
      place.dataset.ready = "true";
    } catch (error) {
      place.textContent = `This figure could not be drawn (${error.message}); its files are linked below.`;
      place.classList.add("failed");
      setTimeout(() => { throw error; });
    }
  }

  // The data of a figure; of one with several x axes those of the axis that is chosen.
  function shownScript(figure) {
    return figure.querySelector(`script[data-view="${figure.dataset.view}"]`) ?? figure.querySelector("script");
  }

  // Every curve brings its values for each kind of smoothing.
  function smooth(figure, traces) {
    const slider = figure.querySelector(".controls input");
    if (!slider) return;
    for (const trace of traces) {
      if (trace.meta?.smoothings) trace.y = trace.meta.smoothings[slider.value];
    }
  }

  function choose(figure, view) {
    figure.dataset.view = view;
    for (const button of figure.querySelectorAll(".switch button")) {
      button.setAttribute("aria-pressed", button.dataset.view === view);
    }
    for (const files of figure.querySelectorAll(".of-view")) files.hidden = files.dataset.view !== view;
    draw(figure, scheme.matches);
  }

  for (const figure of document.querySelectorAll("figure.views")) {
    const slider = figure.querySelector(".controls input");
    figure.querySelector(".controls").hidden = false;
    figure.dataset.view = figure.querySelector("script").dataset.view;
    for (const files of figure.querySelectorAll(".of-view")) files.hidden = files.dataset.view !== figure.dataset.view;
    for (const button of figure.querySelectorAll(".switch button")) {
      button.addEventListener("click", () => choose(figure, button.dataset.view));
    }
    slider?.addEventListener("input", () => {
      figure.querySelector("output").textContent = slider.list.options[slider.value].label;
      draw(figure, scheme.matches);
    });
  }

  // The ticks of logarithmic axes are chosen for the whole range; zoomed in, plotly chooses.
  function keepTicks(place, layout) {
    for (const axis of ["xaxis", "yaxis"]) {
      if (!layout[axis].tickvals) continue;
      place.on("plotly_relayout", (change) => {
        const zoomed = `${axis}.range[0]` in change;
        const reset = `${axis}.autorange` in change || `${axis}.range` in change;
        if (zoomed || reset) Plotly.relayout(place, { [`${axis}.tickmode`]: zoomed ? "auto" : "array" });
      });
    }
  }

  function drawAll(dark) {
    for (const figure of figures) draw(figure, dark);
  }

  drawAll(scheme.matches);
  scheme.addEventListener("change", () => drawAll(scheme.matches));
  addEventListener("beforeprint", () => drawAll(false));
  addEventListener("afterprint", () => drawAll(scheme.matches));

  // A table that is wider than its place says so.
  function markWide() {
    for (const box of document.querySelectorAll(".scroll")) {
      box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1);
    }
  }
  markWide();
  addEventListener("resize", markWide);

  // A click on the head of a column sorts its table: numbers by value, other cells as text.
  function sortBy(head) {
    const rows = [...head.closest("table").tBodies[0].rows];
    const falling = head.ariaSort === "ascending";
    const value = (row) => row.cells[head.cellIndex].textContent.trim();
    const powers = { k: 1e3, K: 1e3, M: 1e6, G: 1e9, B: 1e9, T: 1e12, P: 1e15 };
    const number = (text) => {
      const [, digits, letter] = text.replaceAll(",", "").replace("\u2212", "-").match(/^([-+.\de]+) ?(\w?)/) ?? [];
      return parseFloat(digits) * (powers[letter] ?? 1);
    };
    const compare = head.classList.contains("number")
      ? (a, b) => number(value(a)) - number(value(b)) || 0
      : (a, b) => value(a).localeCompare(value(b), undefined, { numeric: true });
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.ariaSort = falling ? "descending" : "ascending";
    rows.sort((a, b) => (value(a) === "") - (value(b) === "") || (falling ? compare(b, a) : compare(a, b)));
    head.closest("table").tBodies[0].append(...rows);
  }

  for (const head of document.querySelectorAll("th")) {
    if (head.closest("table").tBodies[0].rows.length < 3 || !head.textContent) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.title = "sort by this column";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sortBy(head));
  }

  async function copy(code) {
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {  // a page opened from a file has no clipboard in some browsers
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
  }

  for (const button of document.querySelectorAll(".command button")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      await copy(button.parentElement.querySelector("code"));
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }

  // A live page is loaded again when its server has another version.
  const live = document.getElementById("live");
  let version = null;
  async function refresh() {
    try {
      const found = await (await fetch("version", { cache: "no-store" })).text();
      if (version !== null && found !== version) location.reload();
      version = found;
    } catch {
      live.textContent = "The server has ended; this is its last page.";
    }
  }
  if (live) {
    refresh();
    setInterval(refresh, 5000);
  }
})();
