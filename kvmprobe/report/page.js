// SPDX-License-Identifier: MIT
"use strict";
// What every page does: tells the style that there is a script, and chooses the colours.
(() => {
  const root = document.documentElement;
  root.classList.add("script");
  const button = document.getElementById("theme");
  const themes = ["auto", "light", "dark"];
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(root.dataset.theme ?? "auto") + 1) % 3];
    if (next === "auto") delete root.dataset.theme; else root.dataset.theme = next;
    button.textContent = `Colours: ${next}`;
    button.setAttribute("aria-label", `Colours: ${next === "auto" ? "as the system" : next}`);
  });
})();
