"use strict";
// Tables that are sorted by a click on a head, and filtered by words. Without this script they are plain tables.
for (const box of document.querySelectorAll(".sortable")) {
  const body = box.querySelector("tbody"), rows = [...body.rows];
  const find = box.querySelector("input"), output = box.querySelector("output");
  const heads = [...box.querySelectorAll("th")];
  const valueOf = (row, i) => row.cells[i].dataset.v ?? row.cells[i].textContent.trim();

  const filter = () => {
    const words = find.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    output.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  };

  const sort = (i) => {
    const digits = heads[i].classList.contains("number");
    // Numbers begin with the largest, names with the first; a second click turns them round.
    const before = heads[i].getAttribute("aria-sort");
    const rising = before === "none" ? !digits : before === "descending";
    const compare = (a, b) => {
      const [x, y] = [valueOf(a, i), valueOf(b, i)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what is not known comes last
      return (rising ? 1 : -1) * (digits ? x - y : x.localeCompare(y, undefined, { numeric: true }));
    };
    heads.forEach((head) => head.setAttribute("aria-sort", "none"));
    heads[i].setAttribute("aria-sort", rising ? "ascending" : "descending");
    body.append(...rows.sort(compare));
  };

  box.classList.add("live");
  find.addEventListener("input", filter);
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => sort(i)));
  filter();
}
