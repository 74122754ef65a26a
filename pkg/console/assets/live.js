// Renews what is seen when there is news, and keeps relative times true. Without
// this script the pages are complete; they are then renewed by hand.
"use strict";
(() => {
  const badge = document.getElementById("live");
  const events = document.body.dataset.events;
  if (!badge || !events) return;
  let live = true;
  let wanted = false; // there is news that is not shown yet
  let busy = false;
  let source = null;

  const show = (state) => {
    badge.dataset.state = state;
    badge.querySelector("span").textContent =
      { live: "Live", paused: "Paused", waiting: "Connecting" }[state];
  };

  // Whoever types or selects something is not disturbed.
  const occupied = () => {
    const at = document.activeElement;
    const selection = document.getSelection();
    return (at && at.closest("main") && at.matches("input, select, textarea")) ||
      (selection && !selection.isCollapsed) || document.hidden;
  };

  // What was focused or opened stays so: by id, else by address.
  const keep = (main) => {
    const at = document.activeElement;
    const open = [...main.querySelectorAll("details[open][id]")].map((d) => d.id);
    let focused = null;
    if (at && main.contains(at)) focused = { id: at.id, href: at.getAttribute("href") };
    const scrolled = [...main.querySelectorAll("[data-scroll]")].map((e) => [e.dataset.scroll, e.scrollLeft]);
    return (fresh) => {
      for (const id of open) {
        const d = fresh.querySelector("details#" + CSS.escape(id));
        if (d) d.open = true;
      }
      for (const [name, left] of scrolled) {
        const e = fresh.querySelector("[data-scroll=" + CSS.escape(name) + "]");
        if (e) e.scrollLeft = left;
      }
      if (!focused) return;
      const again = (focused.id && document.getElementById(focused.id)) ||
        (focused.href && [...fresh.querySelectorAll("a[href]")].find((a) => a.getAttribute("href") === focused.href));
      if (again) again.focus({ preventScroll: true });
    };
  };

  const renew = () => {
    wanted = true;
    if (busy || !live || occupied()) return;
    wanted = false;
    busy = true;
    // The browser parses the document without running anything in it.
    const request = new XMLHttpRequest();
    request.open("GET", location.href);
    request.responseType = "document";
    request.timeout = 15000;
    request.onloadend = () => {
      busy = false;
      const main = document.querySelector("main");
      const fresh = request.status === 200 && request.response && request.response.querySelector("main[data-live]");
      if (request.responseURL && new URL(request.responseURL).pathname !== location.pathname) {
        location.reload(); // signed out
        return;
      }
      if (!fresh || !main || occupied()) return;
      const restore = keep(main);
      main.replaceWith(document.adoptNode(fresh));
      restore(fresh);
      const mark = request.response.querySelector("[data-worst]");
      const old = document.querySelector("[data-worst]");
      if (mark && old) old.replaceWith(document.adoptNode(mark));
      document.documentElement.dataset.renewed = String(Number(document.documentElement.dataset.renewed || 0) + 1);
      if (wanted) renew();
    };
    request.send();
  };

  const begin = () => {
    source = new EventSource(events);
    show("waiting");
    source.addEventListener("ready", () => show("live"));
    source.addEventListener("change", renew);
    source.addEventListener("tick", renew);
    source.onerror = () => {
      show("waiting");
      if (source.readyState === EventSource.CLOSED) setTimeout(() => { if (live) begin(); }, 10000);
    };
  };

  badge.hidden = false;
  badge.addEventListener("click", () => {
    live = !live;
    badge.setAttribute("aria-pressed", String(live));
    if (source) source.close();
    if (live) {
      begin();
      renew();
    } else {
      show("paused");
    }
  });
  for (const event of ["visibilitychange", "focusout", "selectionchange"]) {
    document.addEventListener(event, () => { if (wanted) renew(); });
  }
  addEventListener("pagehide", () => { if (source) source.close(); });
  addEventListener("pageshow", (e) => { if (e.persisted && live) begin(); });
  begin();

  const short = (s) => {
    const two = (a, x, b, y, both) => a + x + (both && b ? b + y : "");
    if (s < 60) return s + "s";
    if (s < 3600) return two(Math.floor(s / 60), "m", s % 60, "s", s < 600);
    if (s < 172800) return two(Math.floor(s / 3600), "h", Math.floor(s / 60) % 60, "m", true);
    const days = Math.floor(s / 86400);
    if (days < 730) return two(days, "d", Math.floor(s / 3600) % 24, "h", days < 10);
    return Math.floor(days / 365) + "y";
  };
  // The server's clock counts: the pages say what it was.
  const ahead = Date.now() - Date.parse(document.body.dataset.now);
  setInterval(() => {
    if (!live || document.hidden) return;
    const now = Date.now() - ahead;
    for (const t of document.querySelectorAll("time[datetime] > .ago")) {
      const d = Math.round((now - Date.parse(t.parentNode.dateTime)) / 1000);
      const text = d < 0 ? "in " + short(-d) : d === 0 ? "now" : short(d) + " ago";
      if (t.textContent !== text) t.textContent = text;
    }
  }, 1000);
})();
