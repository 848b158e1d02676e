/** The pages of a run beside its trees: the experiment's graph, tables, training curves, and replies of two models. */
import { type Drawing, type GraphNode, type Replies, type Run, type Student, type Table, get } from "./api";
import { counted, h, select, svg } from "./dom";
import type { Query } from "./list";
import { prose } from "./text";
import { MARKS, words } from "./tree";

/** The nodes of the experiment as boxes, with what reads what and how far each is. */
function graph(nodes: GraphNode[], { width, height, box: [across, down], boxes, lines }: Drawing): SVGElement {
  const drawn = nodes.map((node) => {
    const [x, y] = boxes[node.name];
    const name = node.name.slice(node.name.indexOf("/") + 1);
    const seconds = node.seconds === null ? "" : ` · ${node.seconds < 90 ? `${node.seconds.toFixed(0)} s` : `${(node.seconds / 60).toFixed(0)} min`}`;
    return svg("g", { class: `${node.kind} ${node.state}` }, svg("title", {}, node.name),
      svg("rect", { x, y, width: across, height: down, rx: 5 }),
      svg("text", { x: x + 10, y: y + 19, class: "name" }, name.length > 26 ? `${name.slice(0, 25)}…` : name),
      svg("text", { x: x + 10, y: y + 35 }, `${node.kind} · ${node.state}${seconds}`));
  });
  return svg("svg", { class: "graph", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "The nodes of the experiment" },
    ...lines.map((d) => svg("path", { d })), ...drawn);
}

function tableView(table: Table): HTMLElement {
  const words = table.header.map((_, place) => !table.rows.some((row) => /^[−±-]?\d/.test(row[place] ?? "")));
  const kind = (place: number) => ({ class: words[place] ? "words" : null });
  return h("section", {}, h("h2", {}, table.title),
    h("div", { class: "wide" }, h("table", {}, h("thead", {}, h("tr", {}, table.header.map((cell, place) => h("th", kind(place), cell)))),
      h("tbody", {}, table.rows.map((row) => h("tr", {}, row.map((cell, place) => h("td", kind(place), String(cell)))))))),
    table.note ? h("p", { class: "about" }, table.note) : null);
}

/** The experiment: its graph, its tables and its recipe. */
export async function experimentPage(run: Run): Promise<HTMLElement> {
  const tables = await get<Table[]>("tables");
  return h("main", { class: "reading" }, h("div", { class: "wide" }, run.nodes.length ? graph(run.nodes, run.graph) : null),
    tables.map(tableView),
    h("details", {}, h("summary", {}, "recipe"), h("pre", {}, run.recipe)),
    h("p", { class: "about" }, `cotree ${run.version}`));
}

/** Three digits: 0.348, 4.46e−6. */
const short = (value: number): string =>
  (value && Math.abs(value) < 0.001 ? value.toExponential(2) : String(Number(value.toPrecision(3)))).replaceAll("-", "−");

/** One metric over the steps, a line for each student. */
function curve(metric: string, students: Student[]): HTMLElement {
  const lines = students.map(({ curve: steps }) =>
    steps.filter((step) => typeof step[metric] === "number").map((step): [number, number] => [Number(step.step), step[metric] as number]));
  const points = lines.flat();
  const [left, right] = [Math.min(...points.map(([x]) => x)), Math.max(...points.map(([x]) => x))];
  const [low, high] = [Math.min(...points.map(([, y]) => y)), Math.max(...points.map(([, y]) => y))];
  const x = (value: number) => 4 + (292 * (value - left)) / (right - left || 1);
  const y = (value: number) => 114 - (108 * (value - low)) / (high - low || 1);
  return h("figure", {}, h("figcaption", {}, words(metric), h("span", {}, `${short(low)} to ${short(high)}, step ${left} to ${right}`)),
    svg("svg", { viewBox: "0 0 300 120", role: "img", "aria-label": metric }, svg("path", { class: "axis", d: "M4 4V116H298" }),
      ...lines.map((line, place) => (line.length === 1
        ? svg("circle", { class: `c${(place % 6) + 1}`, cx: x(line[0][0]), cy: y(line[0][1]), r: 3 })
        : svg("polyline", { class: `c${(place % 6) + 1}`, points: line.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ") })))));
}

/** The students' training curves; methods are not mixed, because their losses are not comparable. */
export async function studentsPage(): Promise<HTMLElement> {
  const students = await get<Student[]>("students");
  const methods = [...new Set(students.map((student) => student.method))];
  return h("main", { class: "reading" }, students.length ? null : h("p", { class: "empty" }, "No student has been trained."),
    methods.map((method) => {
      const own = students.filter((student) => student.method === method);
      const values = own.flatMap((student) => student.curve).flatMap((step) => Object.entries(step));
      const metrics = [...new Set(values.filter(([, value]) => typeof value === "number").map(([name]) => name))];
      return h("section", {}, h("h2", {}, method.toUpperCase()),
        h("p", { class: "legend" }, own.map((student, place) => h("span", { "--t": `var(--c${(place % 6) + 1})` }, h("i"), student.name))),
        h("div", { class: "figures" }, metrics.filter((name) => !["step", "total_steps", "seconds"].includes(name)).map((metric) => curve(metric, own))));
    }));
}

/** The replies of one model beside another's, by default beside its parent's. */
export async function repliesPage(run: Run, query: Query, go: (query: Query) => void): Promise<HTMLElement> {
  const evaluation = run.evaluations.find((one) => one.name === query.evaluation) ?? run.evaluations[0];
  if (!evaluation || evaluation.models.length < 2) {
    return h("main", { class: "reading" }, h("p", { class: "empty" }, "No two models have been asked the same questions."));
  }
  const { models } = evaluation;
  const parents = new Map(run.students.map((student) => [student.name, student.parent]));
  const withParent = models.filter((model) => models.includes(parents.get(model) ?? ""));
  const model = models.includes(query.model) ? query.model : withParent[withParent.length - 1] ?? models[models.length - 1];
  const others = models.filter((other) => other !== model);
  const parent = parents.get(model) ?? "";
  const beside = others.includes(query.beside) ? query.beside : others.includes(parent) ? parent : others[0];
  const show = query.show ?? "gained";
  const offset = Number(query.offset ?? 0);
  const limit = 20;
  let refused = "";
  const asked = { evaluation: evaluation.name, model, beside, show, offset: String(offset), limit: String(limit) };
  const found = await get<Replies>("replies", asked).catch((error: Error): Replies => {
    refused = error.message;
    return { total: 0, gained: 0, lost: 0, rows: [] };
  });
  const change = (changed: Query) => go({ evaluation: evaluation.name, model, beside, show, ...changed });
  const named = (names: string[]): [string, string][] => names.map((name) => [name, name]);
  const reply = (name: string, text: string, verdict: keyof typeof MARKS) => h("section", { "--t": `var(--${verdict.replace("_", "-")})` },
    h("h3", {}, name, " ", h("span", {}, `${MARKS[verdict]} ${words(verdict)}`)), prose(text));
  return h("main", { class: "reading replies" },
    h("form", { class: "filters" },
      select("evaluation", named(run.evaluations.map((one) => one.name)), evaluation.name, (value) => go({ evaluation: value })),
      select("model", named(models), model, (value) => change({ model: value, beside: "" })),
      select("beside", named(others), beside, (value) => change({ beside: value })),
      select("show", [["gained", `gained (${found.gained})`], ["lost", `lost (${found.lost})`], ["same", "same verdict"], ["all", "all"]], show, (value) => change({ show: value }))),
    refused ? h("p", { class: "message", role: "alert" }, refused) : h("p", { class: "about" }, `${counted(found.total, "question")}; ${model} gained ${found.gained} and lost ${found.lost} against ${beside}`),
    found.rows.map((row) => h("article", {}, h("div", { class: "question" }, h("b", {}, row.question), prose(row.text),
      row.gold ? h("p", { class: "gold" }, "gold ", h("b", {}, row.gold)) : null),
      h("div", { class: "columns" }, reply(model, row.reply, row.verdict), reply(beside, row.beside_reply, row.beside_verdict)))),
    found.total > limit ? h("nav", { class: "pages" },
      h("button", { disabled: offset === 0, onclick: () => change({ offset: String(offset - limit) }) }, "previous"),
      h("button", { disabled: offset + limit >= found.total, onclick: () => change({ offset: String(offset + limit) }) }, "next")) : null);
}
