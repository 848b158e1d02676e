/** What a person says of a chain: accept, reject, or fix with the corrected text, and a note. */
import { Refused, send } from "./api";
import { h } from "./dom";
import { prose } from "./text";
import { type Annotation, type Tree } from "./tree";

const KEYS: Record<string, Annotation["verdict"]> = { a: "accept", r: "reject", x: "fix" };

export interface Annotator { node: string; tree: Tree; name: () => string; readOnly: boolean }

/** The form for the chain that ends in a judged leaf, below what others said of it. */
export class AnnotationForm {
  readonly element = h("section", { class: "annotation" });
  private readonly id: string;
  private saved = Promise.resolve();
  private note?: HTMLInputElement;

  constructor(private readonly by: Annotator, private readonly leaf: number) {
    this.id = by.tree.thought(leaf).id;
    this.show();
  }

  private get all(): Annotation[] {
    return (this.by.tree.json.annotations ??= []);
  }

  private get own(): Annotation | undefined {
    return this.all.find((one) => String(one.leaf) === this.id && one.annotator === this.by.name());
  }

  private show(message = "", draft?: Annotation): void {
    const { own } = this;
    const others = this.all.filter((one) => String(one.leaf) === this.id && (this.by.readOnly || one !== own));
    const now = draft ?? own;
    const note = h("input", { class: "note", placeholder: "note", "aria-label": "note", value: now?.note ?? "",
      onchange: () => {
        if (note !== this.note) return;  // it is being replaced
        if (own?.verdict === "fix") void this.save("fix", note.value, text.value);
        else if (own && fixing.hidden) void this.save(own.verdict, note.value, "");
      } });
    this.note = note;
    const chain = this.by.tree.chain(this.leaf).map((i) => this.by.tree.field(i, "text")).join("\n");
    const text = h("textarea", { class: "fix", rows: 8, "aria-label": "corrected text" });
    text.value = now?.text || chain;
    const fixing = h("div", { class: "fixing", hidden: now?.verdict !== "fix" }, text,
      h("button", { class: "save", onclick: () => this.save("fix", note.value, text.value) }, "save the corrected text"));
    const button = (key: string, verdict: Annotation["verdict"]) => h("button", {
      onmousedown: (event: Event) => event.preventDefault(),  // a note that is being written stays, and goes with the click
      class: verdict, "aria-pressed": String(now?.verdict === verdict), title: `${verdict} (${key})`,
      onclick: () => {
        if (verdict !== "fix") return void this.save(verdict, note.value, "");
        fixing.hidden = false;
        text.focus();
      },
    }, verdict, h("kbd", {}, key));
    const active = this.element.contains(document.activeElement) ? document.activeElement : null;
    this.element.replaceChildren(
      ...others.map((one) => h("div", { class: `said ${one.verdict}` }, h("b", {}, `${one.annotator}: ${one.verdict}`), one.note ? ` ${one.note}` : "",
        one.text ? h("details", {}, h("summary", {}, "the corrected text"), prose(one.text)) : null)),
      ...(this.by.readOnly ? [] : [
        h("div", { class: "buttons" }, Object.entries(KEYS).map(([key, verdict]) => button(key, verdict)),
          own ? h("button", { class: "undo", title: "take it back (u)", onclick: () => this.undo() }, "undo", h("kbd", {}, "u")) : null), note, fixing]),
      message ? h("p", { class: "message", role: "alert" }, message) : "");
    if (active?.className) this.element.querySelector<HTMLElement>(`${active.tagName}.${active.className}`)?.focus();
  }

  /** Do what a key stands for; whether it stands for anything. */
  key(key: string): boolean {
    if (this.by.readOnly) return false;
    if (key === "n") this.element.querySelector<HTMLElement>(".note")?.focus();
    else if (key === "u" && this.own) void this.undo();
    else if (key in KEYS) this.element.querySelector<HTMLElement>(`button.${KEYS[key]}`)?.click();
    else return false;
    return true;
  }

  /** Save when what is being saved has been, so that both are kept. */
  private save(verdict: Annotation["verdict"], note: string, text: string): Promise<void> {
    return (this.saved = this.saved.then(() => this.send(verdict, note, text)));
  }

  private async send(verdict: Annotation["verdict"], note: string, text: string): Promise<void> {
    const { own } = this;
    const { node, tree, name } = this.by;
    const said = { leaf: this.id, annotator: name(), verdict, note, text };
    if (!said.annotator) return this.show("Say your name first, at the top of the page.");
    try {
      const saved = await send<{ version: number }>("POST", "annotations", { ...said, node, tree: tree.json.tree, seen: own?.version ?? null });
      this.replace({ ...said, time: new Date().toISOString(), version: saved.version });
      this.show("saved");
    } catch (error) {
      this.refuse(error, { ...said, time: "" });
    }
  }

  private async undo(): Promise<void> {
    await this.saved;
    const { node, tree, name } = this.by;
    try {
      await send("DELETE", "annotations", { node, tree: tree.json.tree, leaf: this.id, annotator: name(), seen: this.own?.version ?? null });
      this.replace(null);
      this.show("taken back");
    } catch (error) {
      this.refuse(error);
    }
  }

  private replace(one: Annotation | null): void {
    const { own } = this;
    if (own) this.all.splice(this.all.indexOf(own), 1);
    if (one) this.all.push(one);
  }

  /** Say why nothing was saved; where another page saved in between, show what it saved and keep what was written. */
  private refuse(error: unknown, draft?: Annotation): void {
    if (error instanceof Refused && error.status === 409) {
      const theirs = error.body.annotation as Annotation | null | undefined;
      this.replace(theirs ?? null);
      const saved = theirs ? `“${theirs.verdict}${theirs.note ? `: ${theirs.note}` : ""}”` : "its removal";
      return this.show(`Another page saved ${saved} in between. Save again to replace it.`, draft);
    }
    this.show(`Not saved: ${error instanceof Error ? error.message : String(error)}`, draft);
  }
}
