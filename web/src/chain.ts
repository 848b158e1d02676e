/** The panel beside a tree: one chain thought by thought, or two of them with what they share folded. */
import { counted, h, number } from "./dom";
import { prose } from "./text";
import { MARKS, type Tree, colorName, words } from "./tree";

/** A thought with its text, its numbers and its writer. */
function thoughtBox(tree: Tree, i: number): HTMLElement {
  const t = tree.thought(i);
  const numbers: [string, string | null][] = [
    ["value", t.visits ? (t.value / t.visits).toFixed(2) : null], ["visits", t.visits ? String(t.visits) : null],
    ["UCB", t.ucb === null ? null : t.ucb.toFixed(3)], ["tokens", number(t.tokens)], ["seed", String(t.seed)],
    ["seconds", t.seconds.toFixed(2)], ["ended by", t.finish], ["pattern", t.pattern],
  ];
  const flags = [t.forced && "forced answer", t.looped && "loops"].filter(Boolean);
  return h("article", { class: "thought", "--t": `var(${colorName(t.type, t.verdict)})` },
    h("header", {}, h("b", {}, words(t.type), t.verdict ? ` ${MARKS[t.verdict]} ${words(t.verdict)}` : ""),
      h("span", {}, t.model), flags.map((flag) => h("span", { class: "flag" }, flag))),
    prose(t.text, t.prefix),
    t.detail ? h("p", { class: "detail", dir: "auto" }, t.detail) : null,
    h("dl", {}, numbers.filter(([, value]) => value !== null && value !== "").map(([name, value]) =>
      h("div", {}, h("dt", {}, name), h("dd", {}, value)))));
}

function total(tree: Tree, chain: number[]): string {
  const tokens = chain.reduce((sum, i) => sum + tree.field(i, "tokens"), 0);
  const seconds = chain.reduce((sum, i) => sum + tree.field(i, "seconds"), 0);
  const writers = [...new Set(chain.map((i) => tree.field(i, "model")))].join(", ");
  return `${counted(chain.length, "thought")} · ${counted(tokens, "token")} · ${seconds.toFixed(1)} s · ${writers}`;
}

/** The question as it was asked, and its gold answer. */
function question(tree: Tree): HTMLElement {
  return h("section", { class: "question" },
    tree.json.messages.map((message) => h("div", {}, tree.json.messages.length > 1 ? h("b", {}, message.role) : null, prose(message.content))),
    tree.json.gold ? h("p", { class: "gold" }, "gold ", h("b", {}, tree.json.gold)) : null);
}

/** The chain that ends in a thought. */
export function chainView(tree: Tree, end: number, compare: (other: number) => void): HTMLElement {
  const chain = tree.chain(end);
  const uses = tree.uses.get(end) ?? [];
  return h("div", { class: "chain" }, question(tree),
    chain.length ? h("p", { class: "about" }, total(tree, chain)) : null,
    uses.length ? h("ul", { class: "uses" }, uses.map((use) => {
      const other = tree.place(use.other);
      const as = use.as === "chain" ? "a row" : use.as;
      return h("li", { class: use.as }, `${as} in ${use.dataset}, row ${use.row}`,
        other === undefined ? null : h("button", { onclick: () => compare(other) }, "side by side"));
    })) : null,
    chain.map((i) => thoughtBox(tree, i)));
}

/** Two chains side by side; the thoughts that both have are folded. */
export function sideBySide(tree: Tree, first: number, second: number, back: () => void): HTMLElement {
  const chains = [tree.chain(first), tree.chain(second)];
  let shared = 0;
  while (shared < chains[0].length && chains[0][shared] === chains[1][shared]) shared++;
  const title = (end: number): string => {
    const verdict = tree.field(end, "verdict");
    return [verdict ? `${MARKS[verdict]} ${words(verdict)}` : "goes on",
      ...(tree.uses.get(end) ?? []).filter((use) => use.as !== "chain").map((use) => `${use.as} in ${use.dataset}`)].join(", ");
  };
  const both = chains[0].slice(0, shared);
  return h("div", { class: "beside" }, h("button", { class: "back", onclick: back }, "one chain"), question(tree),
    shared ? h("details", { class: "shared" }, h("summary", {}, `Both begin with ${total(tree, both)}`),
      both.map((i) => thoughtBox(tree, i))) : h("p", { class: "about" }, "They share no thought."),
    h("div", { class: "columns" }, [first, second].map((end, place) =>
      h("section", {}, h("h3", {}, title(end)), h("p", { class: "about" }, total(tree, chains[place].slice(shared))),
        chains[place].slice(shared).map((i) => thoughtBox(tree, i))))));
}
