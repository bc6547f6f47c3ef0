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
      const data = JSON.parse(figure.querySelector("script").textContent);
      const { data: traces, layout } = dark ? darkened(data, false) : data;
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
})();
