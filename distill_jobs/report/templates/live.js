"use strict";
// Draws the live figures over their still ones, each when it comes into view. Colours are looked up in the style
// sheet, so that a change of theme recolours them. Where anything is lacking, the still picture stays.
(() => {
  const figures = [...document.querySelectorAll("figure.live")];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  let loading;

  const load = () => (loading ??= (async () => {
    const packed = atob(document.getElementById("plotly").textContent);
    const bytes = Uint8Array.from(packed, (sign) => sign.charCodeAt(0));
    const script = document.createElement("script");
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  })());

  const coloured = (value, style) => {
    if (typeof value === "string") {
      const name = /^var\((--[a-z]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((each) => coloured(each, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, coloured(each, style)]));
    }
    return value;
  };

  const draw = async (figure) => {
    const given = JSON.parse(figure.querySelector("script").textContent);
    // Names beside an axis would leave no room for the plot on a phone; the still picture shrinks as a whole.
    if (innerWidth < 600 && given.layout.yaxis.ticktext) return figure.classList.add("kept");
    await load();
    const { data, layout } = coloured(given, getComputedStyle(document.documentElement));
    layout.dragmode = touch ? false : "zoom";
    const config = {
      responsive: true,
      displaylogo: false,
      displayModeBar: touch ? false : "hover",
      modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
      doubleClick: "reset",
    };
    figure.classList.add("drawn");
    await window.Plotly.react(figure.querySelector(".plot"), data, layout, config);
  };

  if (!("DecompressionStream" in window) || !("IntersectionObserver" in window)) return;
  const watcher = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      watcher.unobserve(target);
      draw(target);
    }
  }, { rootMargin: "400px" });
  figures.forEach((figure) => watcher.observe(figure));
  dark.addEventListener("change", () => figures.filter((each) => each.classList.contains("drawn")).forEach(draw));
})();
