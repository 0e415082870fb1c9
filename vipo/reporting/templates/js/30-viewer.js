// One prompt at a time: before and after, zoom, map, updates, and every arm and seed beside each other.
if (data) {
  const linkTo = id => "#prompt-" + encodeURIComponent(id);
  const ids = () => $$(".prompt:not([hidden])").map(card => card.dataset.prompt);
  const main = data.arms.includes("vipo") ? "vipo" : data.arms.at(-1);
  const state = { id: null, left: null, right: null, update: null };

  const range = (id, min, max, step, value, oninput) =>
    make("input", { type: "range", id, min, max, step, value, oninput });
  const title = make("h2", { id: "viewer-title", dir: "auto" });
  const before = make("div", { class: "side before" }), after = make("div", { class: "side after" });
  const stage = make("div", { class: "stage", tabindex: 0, role: "group", "aria-label": "The two samples; when zoomed, arrow keys move" }, before, after);
  const names = [make("span"), make("span")];
  const choose = side => make("select", { id: "viewer-" + side, onchange: event => { state[side] = event.target.value; state.update = null; draw(); } },
    ...data.runs.map(run => make("option", { value: run.name }, runName(run))));
  const left = choose("left"), right = choose("right");
  const split = range("viewer-split", 0, 100, 1, 50, () => {
    stage.style.setProperty("--split", split.value + "%");
    split.setAttribute("aria-valuetext", split.value + " % " + names[0].textContent);
  });
  const zoom = range("viewer-zoom", 1, 8, .5, 1, () => stage.style.setProperty("--zoom", zoom.value));
  const update = range("viewer-update", 0, 0, 1, 0, () => { state.update = Number(update.value); draw(); });
  const updateTold = make("output", { for: "viewer-update" });
  const map = make("input", { type: "checkbox", id: "viewer-map", onchange: () => draw() });
  const play = make("button", { type: "button", onclick: () => playAll(!playing()) }, "Play");
  const original = make("a", { href: "#" }, "file of this sample");
  const list = make("ul", { class: "runs", "aria-label": "All arms and seeds" });
  const scores = make("tbody");
  const label = (control, ...text) => make("label", { for: control.id }, ...text);
  const time = range("viewer-time", 0, 1, .01, 0, () => hold());
  const timeRow = [label(time, "Time"), time];
  const updateRow = [label(update, "Update ", updateTold), update];
  const body = make("div", { class: "viewer-body" },
    make("div", {},
      stage,
      make("div", { class: "stage-names" }, ...names),
      make("div", { class: "viewer-controls" },
        label(split, "Before and after"), split, label(zoom, "Zoom"), zoom, ...timeRow, ...updateRow,
        label(left, "Left"), left, label(right, "Right"), right,
        label(map, "Map"), make("span", {}, map, " ", play, " ", original))),
    make("div", {}, list,
      make("div", { class: "viewer-scores" }, make("table", {}, make("caption", {}, "Scores of the left and the right sample."),
        make("thead", {}, make("tr", {}, ...["Measure", "left", "right", "difference"].map(text => make("th", { scope: "col" }, text)))), scores))));
  const step = by => {
    const all = ids(), place = all.indexOf(state.id);
    if (all.length) location.hash = linkTo(all[(Math.max(place, 0) + by + all.length) % all.length]);
  };
  const dialog = make("dialog", { id: "viewer", "aria-labelledby": "viewer-title" },
    make("div", { class: "viewer-head" }, title,
      make("button", { type: "button", onclick: () => step(-1), "aria-label": "Previous prompt" }, "←"),
      make("button", { type: "button", onclick: () => step(1), "aria-label": "Next prompt" }, "→"),
      make("button", { type: "button", onclick: () => dialog.close() }, "Close")),
    body);
  dialog.classList.toggle("pixelated", data.pixelated);
  stage.style.setProperty("--ratio", data.size[0] + " / " + data.size[1]);
  stage.style.setProperty("--wide", data.size[0] / data.size[1]);
  document.body.append(dialog);

  const films = () => $$("video", stage);
  const playing = () => films().some(film => !film.paused);
  const playAll = on => {
    films().forEach(film => { if (on) { turnTo(film, films()[0].currentTime); begin(film); } else film.pause(); });
    play.textContent = on ? "Pause" : "Play";
  };
  const hold = () => {
    playAll(false);
    films().forEach(film => turnTo(film, Number(time.value) * (film.duration || 0)));
  };
  const follows = film => film.addEventListener("timeupdate", () => { if (film.duration && !film.paused) time.value = String(film.currentTime / film.duration); });
  const picture = (shot, told) => {
    if (shot.f) {
      const [film, poster] = map.checked && shot.m ? [shot.m, shot.w] : [shot.f, shot.p];
      return [make("video", { class: "plain", src: film, poster, muted: true, loop: true, playsinline: true, preload: "auto", "aria-label": told })];
    }
    const veil = map.checked && shot.v ? make("img", { class: "veil-shown", src: shot.v, alt: "" }) : null;
    return [make("img", { class: "plain", src: shot.p, alt: told }), veil];
  };
  const fill = (side, shot, told) => side.replaceChildren(make("div", { class: "zoomed" }, ...picture(shot, told).filter(Boolean)));

  const draw = () => {
    const all = shotsOf(state.id, state.right);
    update.max = String(all.length - 1);
    const place = state.update === null ? all.length - 1 : Math.min(state.update, all.length - 1);
    update.value = String(place);
    updateRow.forEach(item => { item.hidden = all.length < 2; });
    const [one, other] = [finalOf(state.id, state.left), all[place]];
    updateTold.textContent = place === all.length - 1 ? other.u + " (final)" : String(other.u);
    const told = [runName(runOf(state.left)), runName(runOf(state.right)) + (all.length > 1 ? ", update " + other.u : "")];
    update.setAttribute("aria-valuetext", updateTold.textContent);
    split.setAttribute("aria-valuetext", split.value + " % " + told[0]);
    names.forEach((item, index) => { item.textContent = told[index]; });
    const [moment, going] = [films()[0]?.currentTime || 0, playing()];
    fill(before, one, told[0]);
    fill(after, other, told[1]);
    films().forEach(film => turnTo(film, moment));
    films().slice(0, 1).forEach(follows);
    if (!films().length || !moment) time.value = "0";
    timeRow.forEach(item => { item.hidden = !films().length; });
    left.value = state.left;
    right.value = state.right;
    play.hidden = !films().length;
    playAll(going && films().length > 0);
    original.href = other.o;
    list.replaceChildren(...data.runs.filter(run => data.prompts[state.id][run.name]).map(run => {
      const shot = finalOf(state.id, run.name), first = data.columns[0];
      return make("li", {}, make("button", { type: "button", "aria-pressed": String(run.name === state.right), onclick: () => { state.right = run.name; state.update = null; draw(); } },
        make("span", { class: "shot" }, make("img", { class: "plain", src: shot.p, alt: "", width: data.size[0], height: data.size[1] })),
        runName(run) + " ", make("span", { class: "interval" }, first ? shownNumber(shot.s[0], first) : "")));
    }));
    scores.replaceChildren(...data.columns.map((column, index) => make("tr", {},
      make("th", { scope: "row" }, column.label), make("td", {}, shownNumber(one.s[index], column)), make("td", {}, shownNumber(other.s[index], column)),
      make("td", {}, signed(one.s[index] === null ? null : other.s[index] - one.s[index], column)))));
  };
  const open = id => {
    Object.assign(state, { id, left: firstRun("base").name, right: state.right || firstRun(main).name, update: null });
    title.textContent = $("h3", cardOf(id)).textContent;
    // What scrolls can be reached by keyboard.
    if (title.textContent.length > 300) title.tabIndex = 0;
    else title.removeAttribute("tabindex");
    draw();
    if (!dialog.open) dialog.showModal();
  };
  const follow = () => {
    if (!location.hash.startsWith("#prompt-")) {
      if (dialog.open) dialog.close();
      return;
    }
    let id = location.hash.slice("#prompt-".length);
    try { id = decodeURIComponent(id); } catch { return; }
    if (Object.hasOwn(data.prompts, id)) open(id);
  };
  addEventListener("hashchange", follow);
  document.addEventListener("click", event => {
    const link = event.target.closest("a[href^='#prompt-']");
    if (link && link.hash === location.hash) follow();
    const shot = event.target.closest(":is(.prompt, .see-row) .shot");
    if (shot) {
      const figure = shot.closest("figure"), id = shot.closest("[data-prompt]").dataset.prompt;
      if (figure && runOf(figure.dataset.run).arm !== "base") state.right = figure.dataset.run;
      if (location.hash === linkTo(id)) open(id);
      else location.hash = linkTo(id);
    }
  });
  dialog.addEventListener("close", () => {
    playAll(false);
    // Without a jump of the page: the link stays the prompt's own until then.
    if (location.hash.startsWith("#prompt-")) history.replaceState(null, "", location.pathname + location.search);
    // Back to the link that opened it, as a dialog goes by itself, or to that of the prompt that was looked at last.
    const link = document.activeElement.closest("a");
    if (!link || link.hash !== linkTo(state.id)) $(".open", cardOf(state.id)).focus({ preventScroll: true });
  });
  dialog.addEventListener("keydown", event => {
    const moves = { ArrowLeft: [-10, 0], ArrowRight: [10, 0], ArrowUp: [0, -10], ArrowDown: [0, 10] }[event.key];
    if (event.target === stage && moves) {
      event.preventDefault();
      look(...at.map((value, axis) => Math.min(100, Math.max(0, value + moves[axis]))));
      return;
    }
    if (event.target.matches("input, select")) return;
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  const at = [50, 50];
  const look = (x, y) => {
    at.splice(0, 2, x, y);
    stage.style.setProperty("--at-x", x + "%");
    stage.style.setProperty("--at-y", y + "%");
  };
  const drag = event => {
    const box = stage.getBoundingClientRect();
    const [x, y] = [100 * (event.clientX - box.left) / box.width, 100 * (event.clientY - box.top) / box.height];
    look(x, y);
    if (event.buttons === 1) { split.value = String(Math.round(x)); split.dispatchEvent(new Event("input")); }
  };
  stage.addEventListener("pointermove", drag);
  stage.addEventListener("pointerdown", drag);
  follow();
}
