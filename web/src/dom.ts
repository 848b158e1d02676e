/** Elements made in code. Text becomes text nodes only, so nothing that a model wrote can be markup, with what cannot be
 *  seen in it shown. */

export type Child = Node | string | number | null | undefined | false;
type Props = Record<string, unknown>;

/** Characters that cannot be seen or that turn the text around them, as their code points. */
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

export function visible(text: string): string {
  return text.replace(HIDDEN, (sign) => `⟨U+${sign.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

function fill<E extends Element>(element: E, props: Props, children: (Child | Child[])[]): E {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value as EventListener);
    else if (name.startsWith("--")) (element as unknown as HTMLElement).style.setProperty(name, String(value));
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== false) element.append(child instanceof Node ? child : visible(String(child)));
  }
  return element;
}

/** An HTML element; a prop `onclick` is a listener, `--x` a CSS variable, every other an attribute. */
export function h<T extends keyof HTMLElementTagNameMap>(tag: T, props: Props = {}, ...children: (Child | Child[])[]) {
  return fill(document.createElement(tag), props, children);
}

/** An SVG element. */
export function svg(tag: string, props: Props = {}, ...children: (Child | Child[])[]): SVGElement {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
}

/** A select whose `change` gives the chosen value. */
export function select(
  label: string, options: [string, string][], value: string, change: (value: string) => void,
): HTMLLabelElement {
  const element = h("select", { onchange: () => change(element.value) },
    options.map(([key, text]) => h("option", { value: key, selected: key === value }, text)));
  return h("label", {}, h("span", {}, label), element);
}

/** 12345 as "12,345". */
export const number = (value: number): string => value.toLocaleString("en-US", { maximumFractionDigits: 2 });

/** "1 thought", "2 thoughts". */
export const counted = (n: number, word: string): string => `${number(n)} ${word}${n === 1 ? "" : "s"}`;
