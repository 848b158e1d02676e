/** The viewer's page: which view the address names, and the keys that work everywhere. */
import { AnnotationForm } from "./annotate";
import { type Agreement, type Run, type TreeJson, type TreeList, get, treePath } from "./api";
import { whenColorsChange } from "./canvas";
import { h, select } from "./dom";
import { type Query, listPage } from "./list";
import { type TreePanel, treePanel } from "./panel";
import { experimentPage, repliesPage, studentsPage } from "./run";
import { Tree } from "./tree";

const POLL_MS = 2000;
let run: Run;
let panel: TreePanel | undefined;
let form: AnnotationForm | undefined;
let shown = 0;

/** `#/trees/NODE/TREE?leaf=3` as its parts and its query. */
function address(): { parts: string[]; query: Query } {
  const [path, search = ""] = location.hash.replace(/^#\/?/, "").split("?");
  return { parts: path.split("/").filter(Boolean).map(decodeURIComponent), query: Object.fromEntries(new URLSearchParams(search)) };
}

function link(parts: string[], query: Query = {}): string {
  const given = Object.entries(query).filter(([, value]) => value !== "");
  return `#/${parts.map(encodeURIComponent).join("/")}${given.length ? `?${new URLSearchParams(given)}` : ""}`;
}

function leaveTree(): void {
  panel = form = undefined;
}

/** The trees that are shown first. */
const firstNode = (): string | undefined => (run.trees.find((one) => one.questions) ?? run.trees[0])?.node;

const go = (parts: string[], query: Query): void => { location.hash = link(parts, query); };
const annotator = (): string => run.annotator ?? localStorage.getItem("annotator") ?? "";

/** Dark, light, or as the system has it. */
function setTheme(theme: string): void {
  localStorage.setItem("theme", theme);
  document.documentElement.dataset.theme = theme;
  panel?.canvas.restyle();
}

function header(parts: string[]): HTMLElement {
  const tab = (name: string, to: string[], there: boolean) => h("a", { href: link(to), "aria-current": there ? "page" : null }, name);
  const nodes: [string, string][] = run.trees.map(({ node, questions }) => [node, `${node} (${questions})`]);
  const node = parts[0] === "trees" ? parts[1] : firstNode();
  const name = h("input", { class: "annotator", placeholder: "your name", "aria-label": "your name, for annotations", value: annotator(),
    onchange: () => { localStorage.setItem("annotator", name.value.trim()); void show(); } });
  return h("header", { class: "top" }, h("h1", {}, run.name),
    h("nav", {}, node ? tab("trees", ["trees", node], parts[0] === "trees") : null,
      nodes.length > 1 && parts[0] === "trees" ? select("of", nodes, node ?? "", (value) => go(["trees", value], {})) : null,
      tab("experiment", ["experiment"], parts[0] === "experiment"),
      run.students.length ? tab("students", ["students"], parts[0] === "students") : null,
      run.evaluations.length ? tab("replies", ["replies"], parts[0] === "replies") : null),
    run.read_only || run.annotator ? h("span", { class: "annotator" }, run.read_only ? "read only" : annotator()) : name,
    h("button", { class: "theme", title: "light or dark", "aria-label": "light or dark",
      onclick: () => setTheme(getComputedStyle(document.documentElement).colorScheme === "dark" || (document.documentElement.dataset.theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches) ? "light" : "dark") }, "◐"));
}

/** The questions before and after one in the list that it was opened from. */
async function neighbours(node: string, tree: string, list: Query): Promise<[string?, string?]> {
  const found = await get<TreeList>(treePath(node), { ...list, sort: list.sort ?? "hard", limit: "100" });
  const place = found.rows.findIndex((row) => row.tree === tree);
  return place < 0 ? [] : [found.rows[place - 1]?.tree, found.rows[place + 1]?.tree];
}

async function treePage(node: string, id: string, query: Query): Promise<HTMLElement> {
  const { leaf, ...list } = query;
  const response = await get<TreeJson>(treePath(node, id));
  performance.mark("tree data");
  const tree = new Tree(response);
  const start = tree.place(leaf ?? null) ?? tree.best();
  const by = { node, tree, name: annotator, readOnly: run.read_only };
  panel = treePanel(tree, start, (thought) => {
    form = thought && tree.field(thought, "verdict") ? new AnnotationForm(by, thought) : undefined;
    history.replaceState(null, "", link(["trees", node, id], { ...list, leaf: tree.thought(thought).id }));
    return form?.element ?? null;
  });
  const steps = h("span", { class: "steps" });
  void neighbours(node, id, list).then(([before, after]) => {
    const step = (to: string | undefined, text: string, title: string) => h("a", { href: to === undefined ? null : link(["trees", node, to], list), title }, text);
    steps.append(step(before, "‹", "previous question ([)"), step(after, "›", "next question (])"));
  });
  return h("main", { class: "tree-page" },
    h("div", { class: "crumbs" }, h("a", { href: link(["trees", node], list) }, "‹ questions"), h("b", {}, tree.json.question), h("span", {}, tree.json.task), steps),
    panel.element);
}

/** How far annotators agree, above the list, where there are annotations. */
async function agreement(node: string): Promise<Node | null> {
  const { rows, agreement: found } = await get<Agreement>("annotations", { node });
  if (!rows.length) return null;
  const agreed = found.pairs ? `, ${found.equal} of ${found.pairs} chains judged by two are judged alike${found.kappa === null ? "" : ` (kappa ${found.kappa.toFixed(2)})`}` : "";
  return h("p", { class: "agreement" }, `${rows.length} annotations by ${new Set(rows.map((row) => row.annotator)).size}${agreed}`);
}

async function page(parts: string[], query: Query): Promise<HTMLElement> {
  const [view, node, tree] = parts;
  if (view === "trees" && tree !== undefined) return treePage(node, tree, query);
  if (view === "trees") {
    const [list, agreed] = await Promise.all([
      listPage(node, query, (next) => go(["trees", node], next), (id) => link(["trees", node, id], query)), agreement(node)]);
    if (agreed) list.prepend(agreed);
    return list;
  }
  if (view === "students") return studentsPage();
  if (view === "replies") return repliesPage(run, query, (next) => go(["replies"], next));
  return experimentPage(run);
}

/** Show what the address names; of two that were begun the later one stays. */
async function show(): Promise<void> {
  const turn = ++shown;
  const { parts, query } = address();
  const first = firstNode();
  if (!parts.length && first !== undefined) return location.replace(link(["trees", first]));
  let content: HTMLElement;
  leaveTree();
  try {
    content = await page(parts, query);
  } catch (error) {
    content = h("main", { class: "reading" }, h("p", { class: "message", role: "alert" }, error instanceof Error ? error.message : String(error)));
  }
  if (turn !== shown) return;
  const typing = document.activeElement?.classList.contains("search");
  document.title = `${parts[2] ? `${panel ? parts[2] : ""} · ` : ""}${run.name} · cotree`;
  document.body.replaceChildren(header(parts), content);
  if (typing) document.querySelector<HTMLInputElement>(".search")?.focus();
}

/** Watch a growing run: ask how much has changed, and read the list again when it has. */
async function watch(): Promise<void> {
  let known: Record<string, number> = {};
  for (;;) {
    await new Promise((done) => setTimeout(done, POLL_MS));
    const { parts } = address();
    if (document.hidden || parts[0] !== "trees" || parts.length !== 2) continue;
    const found = await get<{ changes: number }>("version", { node: parts[1] }).catch(() => null);
    if (!found) continue;
    const before = known[parts[1]] ?? found.changes;
    if (before !== found.changes && document.activeElement?.closest(".filters")) continue;
    known = { [parts[1]]: found.changes };
    if (before !== found.changes) {
      run = await get<Run>("run");
      const top = document.querySelector("main")?.scrollTop ?? 0;
      await show();
      document.querySelector("main")!.scrollTop = top;
    }
  }
}

function key(event: KeyboardEvent): void {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if ((event.target as Element).closest("input:not([type=range]), textarea, select")) {
    if (event.key === "Escape") (event.target as HTMLElement).blur();
    return;
  }
  const native = event.key === " " ? "button, summary" : event.key.startsWith("Arrow") ? "input" : "";
  if (native && (event.target as Element).closest(native)) return;
  const click = (selector: string) => document.querySelector<HTMLElement>(selector)?.click();
  if (event.key === "/") document.querySelector<HTMLInputElement>(".search")?.focus();
  else if (event.key === "[") click(".steps a:first-child");
  else if (event.key === "]") click(".steps a:last-child");
  else if (event.key === "p") click(".play");
  else if (event.key === "b") click(".uses button, .back");
  else if (event.key === "Escape") click(document.querySelector(".back") ? ".back" : ".crumbs a");
  else if (!form?.key(event.key)) return panel?.canvas.key(event);
  event.preventDefault();
}

async function start(): Promise<void> {
  document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "";
  run = await get<Run>("run");
  addEventListener("hashchange", () => void show());
  addEventListener("keydown", key);
  whenColorsChange(() => panel?.canvas.restyle());
  await show();
  await watch();
}

void start();
