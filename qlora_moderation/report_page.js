"use strict";
(function () {
  // Texts of rows are only ever set as textContent: nothing in them can become markup or script.
  const data = JSON.parse(document.getElementById("data").textContent);
  const PER_PAGE = 20;
  const get = (id) => document.getElementById(id);
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  for (const table of document.querySelectorAll("table")) {
    table.querySelectorAll("thead th").forEach((head, column) => {
      const button = make("button", "", head.textContent);
      button.type = "button";
      head.textContent = "";
      head.append(button);
      button.addEventListener("click", () => {
        const rising = head.getAttribute("aria-sort") === "descending" || (column === 0 && !head.hasAttribute("aria-sort"));
        table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", rising ? "ascending" : "descending");
        const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
        const rows = Array.from(table.tBodies[0].rows);
        rows.sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          if (x === "" || y === "") return (x === "") - (y === "");
          const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
          return rising ? order : -order;
        });
        table.tBodies[0].append(...rows);
      });
    });
  }

  const fill = (select, entries) => entries.forEach(([value, text]) => {
    const option = make("option", "", text);
    option.value = value;
    select.append(option);
  });
  fill(get("reference"), data.references.map((name, index) => [String(index), name]));
  if (!data.references.length) fill(get("reference"), [["", "nothing"]]);
  fill(get("category"), [["flagged", "flagged"], ...data.categories.map((name, index) => [String(index), name])]);
  fill(get("model"), [["", "any"], ...data.models.map((name, index) => [String(index), name])]);

  const lower = data.rows.map(() => null);
  const textOf = (index) => (lower[index] ??= (data.rows[index].p + "\n" + data.rows[index].r).toLowerCase());

  function view(row) {
    const category = get("category").value;
    const reference = get("reference").value;
    if (category === "flagged") {
      return { decided: row.f === 1, probability: row.k, truth: reference === "" ? null : row.v[Number(reference)] };
    }
    const index = Number(category);
    const labelled = data.references[Number(reference)] === "labels" && row.t !== null;
    return { decided: row.c.includes(index), probability: row.q[index], truth: labelled ? Number(row.t.includes(index)) : null };
  }
  const outcomeOf = ({ decided, truth }) => (truth === null ? "" : (decided ? (truth ? "tp" : "fp") : truth ? "fn" : "tn"));
  const NAMES = { tp: "true positive", fp: "false positive", fn: "false negative", tn: "true negative" };

  let shown = [];
  let page = 0;

  function filter() {
    const outcome = get("outcome").value;
    const model = get("model").value;
    const [low, high] = [Number(get("low").value || 0), Number(get("high").value === "" ? 1 : get("high").value)];
    const words = get("search").value.toLowerCase();
    shown = [];
    data.rows.forEach((row, index) => {
      if (model !== "" && row.m !== Number(model)) return;
      const seen = view(row);
      if (seen.probability < low || seen.probability > high) return;
      const found = outcomeOf(seen);
      if (outcome === "wrong" ? found !== "fp" && found !== "fn" : outcome && found !== outcome) return;
      if (words && !textOf(index).includes(words)) return;
      const wrong = found === "fp" ? seen.probability : found === "fn" ? 1 - seen.probability : -1;
      shown.push({ index, seen, found, wrong });
    });
    const orders = {
      worst: (a, b) => b.wrong - a.wrong || a.index - b.index,
      high: (a, b) => b.seen.probability - a.seen.probability || a.index - b.index,
      low: (a, b) => a.seen.probability - b.seen.probability || a.index - b.index,
      file: (a, b) => a.index - b.index,
    };
    shown.sort(orders[get("order").value]);
    page = 0;
    draw();
  }

  function draw() {
    const list = get("list");
    list.textContent = "";
    const start = page * PER_PAGE;
    const reveal = get("reveal").checked;
    for (const { index, seen, found } of shown.slice(start, start + PER_PAGE)) {
      const row = data.rows[index];
      const card = make("article", found === "fp" || found === "fn" ? "wrong" : "right");
      card.dataset.row = String(index);
      const head = make("header");
      head.append(make("span", "outcome", found ? NAMES[found] : seen.decided ? "yes" : "no"));
      head.append(make("span", "", "probability " + seen.probability.toFixed(3)));
      if (row.m !== null) head.append(make("span", "", "model " + data.models[row.m]));
      const button = make("button", "plain", reveal ? "Hide text" : "Show text");
      button.type = "button";
      button.setAttribute("aria-expanded", String(reveal));
      head.append(button);
      card.append(head);
      const texts = make("div", reveal ? "" : "blurred");
      for (const [name, text] of [["Question: ", row.p], ["Answer: ", row.r]]) {
        const paragraph = make("p", "text");
        paragraph.append(make("b", "", name));
        const veil = make("span", "veil", text);
        if (!reveal) veil.setAttribute("aria-hidden", "true");
        paragraph.append(veil);
        texts.append(paragraph);
      }
      button.addEventListener("click", () => {
        const hidden = texts.classList.toggle("blurred");
        button.textContent = hidden ? "Show text" : "Hide text";
        button.setAttribute("aria-expanded", String(!hidden));
        for (const veil of texts.querySelectorAll(".veil")) {
          if (hidden) veil.setAttribute("aria-hidden", "true"); else veil.removeAttribute("aria-hidden");
        }
      });
      card.append(texts);
      const facts = ["judged: " + (row.c.map((i) => data.categories[i]).join("; ") || "no category")];
      if (row.t !== null) facts.push("labels: " + (row.t.map((i) => data.categories[i]).join("; ") || "no category"));
      data.references.forEach((name, i) => {
        if (row.v[i] !== null) facts.push(name + ": " + (row.v[i] ? "flagged" : "not flagged"));
      });
      if (row.w > 1) facts.push(row.w + " windows");
      if (row.n) facts.push("prompt known from training");
      card.append(make("p", "facts", facts.join(" \u00b7 ")));
      list.append(card);
    }
    const last = Math.min(start + PER_PAGE, shown.length);
    get("count").textContent = shown.length ? `${start + 1} to ${last} of ${shown.length} rows` : "no row";
    get("back").disabled = page === 0;
    get("next").disabled = last >= shown.length;
  }

  get("back").addEventListener("click", () => { page -= 1; draw(); });
  get("next").addEventListener("click", () => { page += 1; draw(); });
  get("reveal").addEventListener("change", draw);
  get("filters").addEventListener("submit", (event) => event.preventDefault());
  let waiting = 0;
  for (const id of ["reference", "category", "outcome", "model", "order"]) get(id).addEventListener("change", filter);
  for (const id of ["low", "high", "search"]) {
    get(id).addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 150); });
  }
  filter();
})();
