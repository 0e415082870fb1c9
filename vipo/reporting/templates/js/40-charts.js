// Values under the pointer, and one arm lit in every chart and table.
{
  const tip = make("div", { class: "tip", role: "status", hidden: true });
  document.body.append(tip);
  for (const chart of $$("svg[data-points]")) {
    const points = JSON.parse(chart.dataset.points);
    chart.addEventListener("pointermove", event => {
      const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
      let best = null, near = 14;
      for (const point of points) {
        const apart = Math.hypot(point[0] - place.x, point[1] - place.y);
        if (apart < near) [best, near] = [point, apart];
      }
      tip.hidden = !best;
      if (!best) return;
      tip.textContent = best[2];
      tip.style.left = Math.max(4, Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 4)) + "px";
      tip.style.top = Math.max(4, event.clientY - tip.offsetHeight - 12) + "px";
    });
    chart.addEventListener("pointerleave", () => { tip.hidden = true; });
  }

  let pinned = null;
  const light = arm => {
    for (const item of $$("svg [data-arm]")) {
      item.classList.toggle("dim", arm !== null && item.dataset.arm !== arm);
    }
    for (const row of $$("tr[data-arm]")) row.style.opacity = arm === null || row.dataset.arm === arm ? "" : ".45";
    for (const key of $$(".legend .arm")) key.setAttribute("aria-pressed", String(arm !== null && key.dataset.arm === arm));
  };
  for (const key of $$(".legend .arm")) {
    key.setAttribute("role", "button");
    key.setAttribute("aria-pressed", "false");
    key.tabIndex = 0;
    const toggle = () => { pinned = pinned === key.dataset.arm ? null : key.dataset.arm; light(pinned); };
    key.addEventListener("click", toggle);
    key.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(); }
    });
    key.addEventListener("pointerenter", () => light(key.dataset.arm));
    key.addEventListener("pointerleave", () => light(pinned));
  }
}
