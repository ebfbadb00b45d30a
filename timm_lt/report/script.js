"use strict";
(() => {
  const PAGE = 100;
  const byId = (id) => document.getElementById(id);
  for (const part of document.querySelectorAll("[data-script]")) part.hidden = false;

  // The head that is compared with the joint classifier: one choice for all sections.
  const pickers = document.querySelectorAll("[data-picker]");
  for (const picker of pickers) {
    picker.addEventListener("change", () => {
      for (const other of pickers) other.value = picker.value;
      for (const panel of document.querySelectorAll("[data-head]")) {
        panel.hidden = panel.dataset.head !== picker.value;
      }
    });
  }

  const data = JSON.parse(byId("class-data").textContent);
  const table = byId("class-table");
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  const collator = new Intl.Collator(undefined, { numeric: true });
  const RANKS = { many_shot: 2, medium_shot: 1, few_shot: 0 };
  const TEXT = 0, GROUP = 2, FIGURES = 4;
  const names = data.rows.map((row) => row[TEXT].toLowerCase());
  const order = data.rows.map((_, index) => index);
  let column = null, descending = false, page = 0, view = order;

  const compare = (a, b) => {
    const x = data.rows[a][column], y = data.rows[b][column];
    // What is not known comes last, in either direction.
    if (x === null || y === null) return (x === null) - (y === null) || a - b;
    let difference;
    if (column === TEXT) difference = collator.compare(x, y);
    else if (column === GROUP) difference = RANKS[x] - RANKS[y];
    else difference = x - y;
    return (descending ? -difference : difference) || a - b;
  };

  const number = (value) => value.toLocaleString("en");
  const percent = (value) => (value === null ? "-" : (100 * value).toFixed(1));
  const points = (value) => {
    if (value === null) return "-";
    const text = (100 * Math.abs(value)).toFixed(1);
    return (text === "0.0" ? "" : value > 0 ? "+" : "−") + text;
  };

  const cell = (row, text, look) => {
    const made = row.insertCell();
    made.textContent = text;
    if (look) made.className = look;
    return made;
  };

  const drawRow = (values) => {
    const row = document.createElement("tr");
    const heading = document.createElement("th");
    const name = document.createElement("bdi");
    heading.scope = "row";
    // A name may go on in another line after an underscore.
    values[TEXT].split("_").forEach((part, index) => {
      if (index) name.append("_", document.createElement("wbr"));
      name.append(part);
    });
    heading.append(name);
    row.append(heading);
    cell(row, number(values[1]));
    const tag = document.createElement("span");
    tag.className = `tag t-${values[GROUP]}`;
    tag.textContent = values[GROUP].replace("_shot", "");
    cell(row, "", "words").append(tag);
    cell(row, number(values[3]));
    for (const accuracy of values.slice(FIGURES, FIGURES + data.heads)) {
      const made = cell(row, percent(accuracy), "bar");
      if (accuracy !== null) made.style.setProperty("--v", `${100 * accuracy}%`);
    }
    if (data.change) {
      const change = values[FIGURES + data.heads];
      cell(row, points(change), change > 0 ? "up" : change < 0 ? "down" : "");
    }
    return row;
  };

  const show = () => {
    const pages = Math.max(Math.ceil(view.length / PAGE), 1);
    page = Math.min(Math.max(page, 0), pages - 1);
    const shown = view.slice(page * PAGE, (page + 1) * PAGE);
    body.replaceChildren(...shown.map((index) => drawRow(data.rows[index])));
    tell();
  };

  const tell = () => {
    const start = page * PAGE, end = Math.min(start + PAGE, view.length);
    const of = `${number(view.length)} class${view.length === 1 ? "" : "es"}`;
    byId("status").textContent = view.length ? `${number(start + 1)} to ${number(end)} of ${of}` : "No class matches";
    byId("previous").disabled = page === 0;
    byId("next").disabled = end >= view.length;
    byId("next").parentElement.hidden = view.length <= PAGE;
  };

  const update = () => {
    const query = byId("filter").value.trim().toLowerCase(), group = byId("shots").value;
    view = order.filter((i) => names[i].includes(query) && (!group || data.rows[i][GROUP] === group));
    if (column !== null) view.sort(compare);
    page = 0;
    show();
  };

  headings.forEach((heading, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      // Numbers start with the largest.
      descending = column === index ? !descending : index !== TEXT;
      column = index;
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      update();
    });
  });
  byId("filter").addEventListener("input", update);
  byId("shots").addEventListener("change", update);
  byId("filter").form.addEventListener("submit", (event) => event.preventDefault());
  const turn = (step) => {
    page += step;
    show();
    table.parentElement.scrollTop = 0;
  };
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  tell();
})();
