// The films of one row play together, and one button for all of them leaves the pictures free of controls.
// Another row's button, the maps' switch or another update may come before a film has begun: that is no fault.
const begin = film => film.play().catch(error => { if (error.name !== "AbortError") throw error; });
const turnTo = (film, time) => { if (film.currentTime !== time) film.currentTime = time; };

for (const row of $$(".samples, .see-row").filter(item => $("video", item))) {
  const all = $$("video", row), shown = () => all.filter(film => film.checkVisibility());
  let on = false;
  const button = make("button", { type: "button", class: "play" });
  const play = (go, time) => {
    on = go;
    all.forEach(film => film.pause());
    if (on) shown().forEach(film => { turnTo(film, time); begin(film); });
    button.textContent = on ? "Pause" : "Play";
    button.setAttribute("aria-label", (on ? "Pause" : "Play") + " the videos of this prompt");
  };
  play(false, 0);
  button.addEventListener("click", () => play(!on, shown()[0].currentTime));
  // Other films have been put in place, or the same with their maps.
  row.addEventListener("films", event => play(on && event.detail.go, Math.max(...all.map(film => film.currentTime))));
  all.forEach(film => { film.controls = false; });
  row.prepend(button);
}
const filmsChanged = (row, go) => row.dispatchEvent(new CustomEvent("films", { detail: { go } }));
$("#maps")?.addEventListener("change", () => $$(".samples, .see-row").forEach(row => filmsChanged(row, true)));
