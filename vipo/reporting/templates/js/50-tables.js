// Tables that can be put in another order: by a click on a column's name.
for (const table of $$("table.sortable")) {
  const body = table.tBodies[0], original = [...body.rows];
  [...table.tHead.rows[0].cells].forEach((head, place) => {
    const button = make("button", { type: "button" }, ...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const next = { none: "descending", descending: "ascending", ascending: "none" }[head.getAttribute("aria-sort") || "none"];
      $$("th[aria-sort]", table.tHead).forEach(other => other.removeAttribute("aria-sort"));
      const value = row => {
        const text = row.cells[place].dataset.value ?? row.cells[place].textContent.trim().replace("−", "-");
        return Number.isNaN(parseFloat(text)) ? text : parseFloat(text);
      };
      const sign = next === "ascending" ? 1 : -1;
      // What is no number ("—") stands behind those that are, in either order.
      const compare = (a, b) => (typeof a === typeof b
        ? sign * (typeof a === "number" ? a - b : a.localeCompare(b)) : Number(typeof a === "string") - Number(typeof b === "string"));
      if (next !== "none") head.setAttribute("aria-sort", next);
      body.append(...(next === "none" ? original : [...original].sort((a, b) => compare(value(a), value(b)))));
    });
  });
}
