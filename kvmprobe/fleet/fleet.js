// SPDX-License-Identifier: MIT
"use strict";
// Filters the hosts. Everything is there without it.
(() => {
  const byId = (id) => document.getElementById(id);

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
