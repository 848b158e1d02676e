/** The words of a model as text, with its maths typeset; whatever is no good maths stays the text that it is. */
import katex from "katex";
import { h, visible } from "./dom";

const LONGEST_MATHS = 2000;  // characters; longer ones stay text
const MOST_MATHS = 300;  // in one text
const LONGEST = 20_000;  // characters that are shown before a click
// $$…$$, \[…\], \(…\), and $…$ as pandoc has it: no space inside the dollars, no digit after them.
const DELIMITED = /\$\$([^$]+)\$\$|\\\[([\s\S]+?)\\\]|\\\(([\s\S]+?)\\\)|\$(?![\s$])([^$\n]*?[^\s$\\])\$(?!\d)|(\\boxed\{)/g;

/** The end of the braces that open just before `from`, or -1. */
function closing(text: string, from: number): number {
  let open = 1;
  for (let i = from; i < Math.min(text.length, from + LONGEST_MATHS); i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === "{") open++;
    else if (text[i] === "}" && --open === 0) return i + 1;
  }
  return -1;
}

/** For links, pictures and HTML in maths, which KaTeX would leave out: the maths stays text instead. */
function refuse(): boolean {
  throw new Error("not trusted");
}

function maths(source: string, display: boolean): HTMLElement | null {
  if (source.length > LONGEST_MATHS) return null;
  const element = h("span", { class: display ? "maths display" : "maths", title: source });
  try {
    katex.render(source, element, {
      displayMode: display, throwOnError: true, trust: refuse, strict: "ignore", maxSize: 20, maxExpand: 200,
      output: document.body.dataset.maths === "mathml" ? "mathml" : "html",
    });
    return element;
  } catch {
    return null;  // no maths, or too much of it
  }
}

/** A text as nodes. */
export function withMaths(text: string): (Node | string)[] {
  const nodes: (Node | string)[] = [];
  let done = 0;
  let count = 0;
  DELIMITED.lastIndex = 0;
  for (let found = DELIMITED.exec(text); found && count < MOST_MATHS; found = DELIMITED.exec(text)) {
    const start = found.index;
    const end = found[5] ? closing(text, start + found[0].length) : start + found[0].length;
    const inner = found[5] ? text.slice(start, end) : found[1] ?? found[2] ?? found[3] ?? found[4];
    const element = end < 0 || inner === "\\boxed{}" ? null : maths(inner, found[1] !== undefined || found[2] !== undefined);
    if (!element) {
      DELIMITED.lastIndex = start + 1;
      continue;
    }
    nodes.push(visible(text.slice(done, start)), element);
    done = DELIMITED.lastIndex = end;
    count++;
  }
  return [...nodes, visible(text.slice(done))];
}

/** A paragraph of model text: its prefix set apart, and folded where it is very long. */
export function prose(text: string, prefix = ""): HTMLElement {
  const known = prefix && text.startsWith(prefix) ? prefix : "";
  const start = known.endsWith("\\boxed{") ? known.slice(0, -7) : known;  // maths is typeset in one piece
  const element = h("div", { class: "prose", dir: "auto" });
  const write = (upTo: number) => element.replaceChildren(
    ...(start ? [h("em", {}, ...withMaths(start))] : []), ...withMaths(text.slice(start.length, upTo)));
  write(LONGEST);
  if (text.length > LONGEST) {
    const rest = `show the other ${(text.length - LONGEST).toLocaleString("en-US")} characters`;
    element.append(h("button", { onclick: () => write(text.length) }, rest));
  }
  return element;
}
