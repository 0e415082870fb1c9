// Find, order, and the slider over kept updates.
if (data) {
  const list = $("#prompts"), cards = $$(".prompt", list), count = $("#count");
  const texts = new Map(cards.map(card => [card, $("h3", card).textContent.toLowerCase()]));
  $$(".scripted").forEach(item => { item.hidden = false; });

  const find = $("#find"), order = $("#order");
  const moved = (card, arm, column) => {
    const place = data.columns.findIndex(item => item.key === column), id = card.dataset.prompt;
    const last = run => data.prompts[id][run.name].at(-1).s[place];
    return last(firstRun(arm)) - last(firstRun("base"));
  };
  const show = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const card of cards) {
      card.hidden = !words.every(word => texts.get(card).includes(word));
      shown += !card.hidden;
    }
    count.textContent = shown === cards.length ? shown + " prompts" : shown + " of " + cards.length + " prompts";
  };
  find.addEventListener("input", show);
  order.addEventListener("change", () => {
    const [arm, column, direction] = order.value.split("|");
    const sign = direction === "down" ? -1 : 1;
    const ranked = order.value
      ? cards.map(card => [sign * moved(card, arm, column), card]).sort((a, b) => a[0] - b[0]).map(item => item[1])
      : cards;
    list.append(...ranked);
  });
  show();

  const slider = $("#update"), told = $("#update-shown");
  if (slider) {
    const updates = [...new Set(data.runs.flatMap(run => Object.values(data.prompts).flatMap(
      runs => (runs[run.name] || []).slice(0, -1).map(entry => entry.u))))].sort((a, b) => a - b);
    const finals = new Map();
    const swap = () => {
      const update = updates[Number(slider.value)];
      told.textContent = update === undefined ? "final" : String(update);
      for (const card of cards) {
        for (const figure of $$("figure", card)) {
          const media = $(".plain", figure), veil = $(".veil, .mapped", figure);
          if (!finals.has(media)) finals.set(media, media.getAttribute("src"));
          const entry = update === undefined ? null
            : data.prompts[card.dataset.prompt][figure.dataset.run].find(item => item.u === update && item.p);
          const base = runOf(figure.dataset.run).arm === "base";
          media.setAttribute("src", entry ? entry.f || entry.p : finals.get(media));
          figure.classList.toggle("missing", update !== undefined && !entry && !base);
          // Maps are kept of final samples alone.
          if (veil) veil.hidden = Boolean(entry);
        }
      }
    };
    slider.addEventListener("input", swap);
  }
}
