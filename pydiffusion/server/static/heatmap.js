// Entropy by position (across) and step (down): dark where the model is sure. A picture, and its words.
"use strict";

const HEAT_HEIGHT = 3; // pixels of the picture for a step

// A canvas element for the frames of one answer; a click on it calls `choose` with the frame's number.
function heatMap(frames, choose) {
  const map = document.createElement("canvas");
  const n = Math.max(...frames.map((frame) => frame.entropy.length));
  map.width = n;
  map.height = frames.length;
  map.className = "heat";
  map.style.height = `${Math.min(240, Math.max(24, HEAT_HEIGHT * frames.length))}px`;
  map.setAttribute("role", "img");
  const mean = (frame) => frame.entropy.reduce((sum, h) => sum + h, 0) / frame.entropy.length;
  const first = mean(frames[0]).toFixed(2);
  const last = mean(frames[frames.length - 1]).toFixed(2);
  map.setAttribute(
    "aria-label",
    `Entropy of ${n} positions over ${frames.length} steps: ${first} nats on average at first, ${last} at last`,
  );
  const context = map.getContext("2d");
  const pixels = context.createImageData(n, frames.length);
  frames.forEach((frame, row) => {
    for (let i = 0; i < n; i++) {
      const heat = 1 - Math.exp(-(frame.entropy[i] || 0)); // 0: sure, to 1
      const at = 4 * (row * n + i);
      pixels.data[at] = 30 + 225 * heat;
      pixels.data[at + 1] = 30 + 150 * heat * heat;
      pixels.data[at + 2] = 90 + 40 * (1 - heat) - 60 * heat;
      pixels.data[at + 3] = 255;
    }
  });
  context.putImageData(pixels, 0, 0);
  map.addEventListener("click", (event) => {
    const box = map.getBoundingClientRect();
    const row = Math.floor(((event.clientY - box.top) / box.height) * frames.length);
    choose(Math.min(frames.length - 1, Math.max(0, row)));
  });
  return map;
}
