// Tables that can be put in another order: by a click on a column's name.
for (const table of $$("table.sortable")) {
  const body = table.tBodies[0], original = [...body.rows];
  [...table.tHead.rows[0].cells].forEach((head, place) => {
    const button = make("button", { type: "button" }, ...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const next = { none: "descending", descending: "ascending", ascending: "none" }[head.getAttribute("aria-sort") || "none"];
      $$("th[aria-sort]", table.tHead).forEach(other => other.removeAttribute("aria-sort"));
      const value = row => row.cells[place].dataset.value === undefined
        ? row.cells[place].textContent.trim() : Number(row.cells[place].dataset.value);
      const sign = next === "ascending" ? 1 : -1;
      const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
      if (next !== "none") head.setAttribute("aria-sort", next);
      body.append(...(next === "none" ? original : [...original].sort((a, b) => sign * compare(value(a), value(b)))));
    });
  });
}
