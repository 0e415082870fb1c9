// Find, order, and the slider over kept updates.
if (data) {
  const list = $("#prompts"), cards = $$(".prompt", list), count = $("#count");
  const texts = new Map(cards.map(card => [card, $("h3", card).textContent.toLowerCase()]));
  $$(".scripted").forEach(item => { item.hidden = false; });

  const find = $("#find"), order = $("#order");
  const moved = (card, arm, column) => {
    const place = data.columns.findIndex(item => item.key === column), id = card.dataset.prompt;
    const last = run => data.prompts[id][run.name].at(-1).s[place];
    const end = last(firstRun(arm)), start = last(firstRun("base"));
    return end === null || start === null ? null : end - start;
  };
  let moment = "";
  const show = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const card of cards) {
      card.hidden = !words.every(word => texts.get(card).includes(word));
      shown += !card.hidden;
    }
    count.textContent = (shown === cards.length ? shown : shown + " of " + cards.length) + " prompts" + moment;
  };
  const sort = () => {
    const [arm, column, direction] = order.value.split("|");
    const sign = direction === "down" ? -1 : 1;
    // Those without a score come last.
    const rank = gain => (gain === null ? Number.MAX_VALUE : sign * gain);
    const ranked = order.value
      ? cards.map(card => [rank(moved(card, arm, column)), card]).sort((a, b) => a[0] - b[0]).map(item => item[1])
      : cards;
    list.append(...ranked);
  };
  find.addEventListener("input", show);
  order.addEventListener("change", sort);

  const slider = $("#update"), told = $("#update-shown");
  const updates = [...new Set(Object.values(data.prompts).flatMap(
    runs => Object.values(runs).flatMap(shots => shots.slice(0, -1).map(entry => entry.u))))].sort((a, b) => a - b);
  const place = data.columns.findIndex(item => item.key === data.trained);
  let figures = null;
  // Before the first picture is changed, each card's own are noted where the viewer looks for them too.
  const noted = () => cards.flatMap(card => $$("figure", card).map(figure => {
    const id = card.dataset.prompt, name = figure.dataset.run, final = Object.assign(data.prompts[id][name].at(-1), finalOf(id, name));
    const base = data.prompts[id][firstRun("base").name].at(-1);
    return { figure, final, base, shown: final, shots: data.prompts[id][name], media: $(".plain", figure), veil: $(".veil, .mapped", figure), score: $(".score", figure) };
  }));
  const put = (item, update) => {
    const entry = update === undefined ? item.final : item.shots.find(shot => shot.u === update && shot.p);
    const shown = entry || item.final;
    item.figure.classList.toggle("missing", !entry && item.final !== item.base);
    // A source that is set again is read again.
    if (item.shown === shown) return;
    item.shown = shown;
    item.media.setAttribute("src", shown.f || shown.p);
    if (shown.f) item.media.poster = shown.p;
    // Maps are kept of final samples alone.
    if (item.veil) item.veil.hidden = shown !== item.final;
    if (place < 0) return;
    const column = data.columns[place];
    const gain = item.final === item.base || shown.s[place] === null ? [] : [" ", make("span", { class: "gain" }, signed(shown.s[place] - item.base.s[place], column))];
    item.score.replaceChildren(shownNumber(shown.s[place], column), ...gain);
  };
  const swap = () => {
    const update = updates[Number(slider.value)];
    told.textContent = update === undefined ? "final" : String(update);
    slider.setAttribute("aria-valuetext", told.textContent);
    moment = update === undefined ? "" : ", at update " + update;
    figures ??= noted();
    figures.forEach(item => put(item, update));
    cards.forEach(card => filmsChanged($(".samples", card), false));
    show();
  };
  slider?.addEventListener("input", swap);

  show();
  // A page that is loaded again has the reader's words and choices in its fields, once it is shown.
  addEventListener("pageshow", () => {
    if (order.value) sort();
    if (find.value) show();
    if (slider && slider.value !== slider.max) swap();
  });
}
