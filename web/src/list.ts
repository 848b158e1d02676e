/** The list of a node's questions: filters, order and pages are the server's work, and stand in the page's address. */
import { type TreeList, type TreeRow, get, treePath } from "./api";
import { counted, h, number, select } from "./dom";
import { VERDICTS, words } from "./tree";

export type Query = Record<string, string>;
const PAGE = 100;

const SORTS: [string, string][] = [["hard", "hard first"], ["question", "question"], ["correct_share", "correct share"],
  ["thoughts", "thoughts"], ["tokens", "tokens"], ["depth", "depth"], ["forced", "forced answers"]];
const ANY: [string, string] = ["", "any"];

/** The judged chains of a tree as a bar, with their numbers. */
function verdictBar(row: TreeRow): HTMLElement {
  const parts = VERDICTS.filter((verdict) => row[verdict]);
  const title = parts.map((verdict) => `${row[verdict]} ${words(verdict)}`).join(", ");
  return h("div", { class: "bar", title, role: "img", "aria-label": title },
    parts.map((verdict) => h("i", { "--n": row[verdict], "--t": `var(--${verdict.replace("_", "-")})` })));
}

function rowView(row: TreeRow, address: string): HTMLElement {
  const flags = [
    row.reflection && h("span", { class: `flag ${row.reflection}` }, `reflection ${row.reflection}`),
    row.forced > 0 && h("span", { class: "flag" }, `${row.forced} forced`),
    row.looped > 0 && h("span", { class: "flag failed" }, `${row.looped} looped`),
    row.annotated > 0 && h("span", { class: "flag helped" }, `${row.annotated} annotated`),
  ];
  const cell = (name: string, value: number) => h("td", { class: "n", "data-name": name }, number(value));
  return h("tr", {},
    h("td", { class: "question" }, h("a", { href: address }, h("b", {}, row.question), flags, h("div", { dir: "auto" }, row.text))),
    h("td", { class: "task" }, row.task),
    h("td", { class: "verdicts" }, verdictBar(row), h("span", {}, `${row.correct} of ${row.correct + row.wrong + row.no_answer}`)),
    cell("thoughts", row.thoughts), cell("depth", row.depth), cell("tokens", row.tokens));
}

/** The list below its filters.
 *
 *  go: called with the query of another list; address: of a tree, that opens it. */
export async function listPage(
  node: string, query: Query, go: (query: Query) => void, address: (tree: string) => string,
): Promise<HTMLElement> {
  const sort = query.sort ?? "hard";
  const offset = Number(query.offset ?? 0);
  const found = await get<TreeList>(treePath(node), { ...query, sort, offset: String(offset), limit: String(PAGE) });
  const change = (changed: Query) => go({ ...query, offset: "", ...changed });
  const pick = (label: string, name: string, options: [string, string][]) =>
    select(label, [ANY, ...options], query[name] ?? "", (value) => change({ [name]: value }));
  const search = h("input", {
    type: "search", class: "search", placeholder: "search text  ( / )", value: query.q ?? "", "aria-label": "search text",
    onchange: () => change({ q: search.value }),
  });
  const depth = h("input", {
    type: "number", min: 0, value: query.min_depth ?? "", onchange: () => change({ min_depth: depth.value }),
  });
  const tasks = Object.entries(found.tasks);
  const pages = (to: number, text: string) =>
    h("button", { disabled: to < 0 || to >= found.total || to === offset, onclick: () => go({ ...query, offset: String(to) }) }, text);
  return h("main", { class: "list" },
    h("form", { class: "filters", onsubmit: (event: Event) => event.preventDefault() }, search, h("div", {},
      pick("task", "task", tasks.map(([task, n]) => [task, `${task} (${number(n)})`])),
      pick("verdicts", "verdicts", [["mixed", "mixed"], ["all_correct", "all correct"], ["all_wrong", "all wrong"], ["no_answer", "with no answer"]]),
      pick("reflection", "reflected", [["helped", "helped"], ["failed", "failed"]]),
      pick("forced", "forced", [["1", "with forced answers"]]), pick("loops", "looped", [["1", "with loops"]]),
      pick("annotated", "annotated", [["0", "not yet"], ["1", "yes"]]),
      h("label", {}, h("span", {}, "depth ≥"), depth),
      select("order", SORTS, sort, (value) => change({ sort: value })),
      h("button", { type: "button", title: "reverse the order", "aria-label": "reverse the order", onclick: () => change({ desc: query.desc === "1" ? "" : "1" }) },
        query.desc === "1" ? "↓" : "↑"))),
    h("p", { class: "about" }, counted(found.total, "question"),
      Object.keys(query).some((name) => query[name] && !["sort", "desc", "offset"].includes(name))
        ? h("button", { onclick: () => go({ sort, desc: query.desc ?? "" }) }, "clear filters") : null),
    h("table", { class: "trees" },
      h("thead", {}, h("tr", {}, ["question", "task", "chains correct", "thoughts", "depth", "tokens"].map((name, place) =>
        h("th", { class: place > 2 ? "n" : "" }, name)))),
      h("tbody", {}, found.rows.map((row) => rowView(row, address(row.tree))))),
    found.rows.length ? null : h("p", { class: "empty" }, "No question is like this."),
    found.total > PAGE ? h("nav", { class: "pages" }, pages(0, "first"), pages(offset - PAGE, "previous"),
      h("span", {}, `${number(offset + 1)}–${number(Math.min(offset + PAGE, found.total))}`),
      pages(offset + PAGE, "next"), pages(Math.floor((found.total - 1) / PAGE) * PAGE, "last")) : null);
}
