/** A tree with its panel: the canvas, its legend and player, and the chain that is selected. */
import { TreeCanvas } from "./canvas";
import { chainView, sideBySide } from "./chain";
import { h } from "./dom";
import { MARKS, type Tree, VERDICTS, colorName, words } from "./tree";

export interface TreePanel {
  element: HTMLElement;
  canvas: TreeCanvas;
}

/** What the colours and sizes mean, with the types that are in the tree. */
function legend(tree: Tree): HTMLElement {
  const verdicts = VERDICTS.filter((verdict) => tree.colors.includes(colorName("answer", verdict)));
  const key = (color: string, text: string) => h("span", { "--t": `var(${color})` }, h("i"), text);
  return h("p", { class: "legend" },
    [...tree.types].map((type) => key(colorName(type, null), words(type))),
    verdicts.map((verdict) => key(colorName("answer", verdict), `${MARKS[verdict]} ${words(verdict)}`)),
    tree.uses.size ? h("span", {}, "◆ in a dataset ◇ rejected") : null,
    h("span", { class: "muted" }, "larger: more visits"),
    h("span", { class: "muted" }, "by ", tree.writers.join(", ")));
}

/** The tree with a chain selected.
 *
 *  changed: called with the selected thought, and what it gives stands above the chain. */
export function treePanel(tree: Tree, start: number, changed: (thought: number) => Node | null): TreePanel {
  let selected = start;
  const side = h("aside", { class: "side", tabindex: 0, role: "region", "aria-label": "chain" });
  const show = (thought: number) => {
    selected = thought;
    canvas.select(thought, false);
    element.classList.remove("comparing");
    side.replaceChildren(...[changed(thought), chainView(tree, thought, compare)].filter((node) => node !== null));
    side.scrollTop = 0;
  };
  const compare = (other: number) => {
    const rejected = (i: number) => tree.uses.get(i)?.some((use) => use.as === "rejected");
    const [first, second] = rejected(selected) && !rejected(other) ? [other, selected] : [selected, other];
    canvas.mark([first, second]);
    element.classList.add("comparing");
    side.replaceChildren(sideBySide(tree, first, second, () => show(selected)));
    side.scrollTop = 0;
  };
  const slider = h("input", {
    type: "range", min: 1, max: tree.size - 1, value: tree.size - 1, "aria-label": "thoughts so far",
    oninput: () => { canvas.showUpTo(slider.valueAsNumber); count(); },
  });
  const now = h("output");
  const count = () => {
    now.textContent = `${slider.value} / ${tree.size - 1}`;
    if (slider.value === slider.max) play.textContent = "▶ play";
  };
  const canvas = new TreeCanvas(tree, {
    select: (thought, beside) => (beside && thought && thought !== selected ? compare(thought) : show(thought)),
    played: (shown) => { slider.value = String(shown); count(); },
  });
  const play = h("button", {
    title: "the search in order of growth (p)", class: "play",
    onclick: () => { play.textContent = canvas.play() ? "❚❚ stop" : "▶ play"; },
  }, "▶ play");
  const button = (text: string, title: string, act: () => void) => h("button", { title, "aria-label": title, onclick: act }, text);
  const element = h("div", { class: "tree-panel" },
    h("div", { class: "drawing" }, canvas.element,
      h("div", { class: "tools" }, button("−", "zoom out (-)", () => canvas.zoom(1 / 1.4)), button("+", "zoom in (+)", () => canvas.zoom(1.4)),
        button("fit", "the whole tree (0)", () => canvas.fit()), play, slider, now), legend(tree)),
    side);
  count();
  show(start);
  canvas.select(start);
  return { element, canvas };
}
