// While runs train the page is read again, but not from under a reader who looks at a prompt or chooses something.
const renew = $("#renew");
if (renew) {
  renew.closest("[hidden]").hidden = false;
  const busy = () => document.hidden || $("dialog[open]") || document.activeElement.matches("select, input:not(#renew)")
    || $$("video").some(film => !film.paused);
  setInterval(() => { if (renew.checked && !busy()) location.reload(); }, 15000);
}
