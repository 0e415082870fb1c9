// While runs train the page is read again, but not from under a reader who looks at a prompt or chooses something.
const renew = $("#renew");
if (renew) {
  // Its place was kept, so that nothing moves.
  renew.closest("label").classList.remove("unready");
  const busy = () => document.hidden || $("dialog[open]") || document.activeElement.matches("select, input:not(#renew)")
    || $$("video").some(film => !film.paused);
  setInterval(() => { if (renew.checked && !busy()) location.reload(); }, 15000);
}
