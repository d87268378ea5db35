// SPDX-License-Identifier: MIT
"use strict";
// Chooses the colours and filters the hosts. Everything is there without it.
(() => {
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  root.classList.add("script");

  const themes = ["auto", "light", "dark"];
  byId("theme").addEventListener("click", () => {
    const next = themes[(themes.indexOf(root.dataset.theme ?? "auto") + 1) % 3];
    if (next === "auto") delete root.dataset.theme; else root.dataset.theme = next;
    byId("theme").textContent = `Colours: ${next}`;
    byId("theme").setAttribute("aria-label", `Colours: ${next === "auto" ? "as the system" : next}`);
  });

  const hosts = [...document.querySelectorAll(".host, #others tbody tr")]
    .map((element) => ({ element, text: element.textContent.toLowerCase() }));
  const filter = byId("filter");
  filter.addEventListener("input", () => {
    const wanted = filter.value.trim().toLowerCase();
    let shown = 0;
    for (const { element, text } of hosts) {
      element.hidden = !text.includes(wanted);
      shown += !element.hidden;
    }
    byId("shown").textContent = wanted ? `${shown} of ${hosts.length}` : "";
    const others = byId("others");
    if (others && wanted) others.open = true;
  });

  // A link to a host opens it.
  const open = () => {
    const host = location.hash && document.getElementById(location.hash.slice(1));
    if (host && host.matches("details")) host.open = true;
  };
  addEventListener("hashchange", open);
  open();
  addEventListener("beforeprint", () => {
    for (const host of document.querySelectorAll(".host")) host.open = true;
  });
})();
