/** One tree as the page holds it: the JSON of the server or of the report, with typed arrays for what is drawn. */

export type Verdict = "correct" | "wrong" | "no_answer" | "undecided";
export interface Use { leaf: string; as: "chain" | "chosen" | "rejected"; other: string | null; row: number }
export interface Annotation {
  leaf: string; annotator: string; verdict: "accept" | "reject" | "fix"; note: string; text: string; time: string;
  version?: number;
}
export interface TreeJson {
  tree: string; question: string; task: string; messages: { role: string; content: string }[]; gold: string | null;
  settings: Record<string, unknown>; columns: string[]; thoughts: unknown[][]; chosen: Record<string, Use[]>;
  annotations?: Annotation[];
}
export interface Thought {
  id: string; type: string; text: string; prefix: string; model: string; pattern: string | null; visits: number;
  value: number; ucb: number | null; verdict: Verdict | null; detail: string; answer: string | null; tokens: number;
  finish: string; seed: number; seconds: number; forced: boolean; looped: boolean; order: number;
}

export const VERDICTS: Verdict[] = ["correct", "wrong", "no_answer", "undecided"];
export const MARKS: Record<Verdict, string> = { correct: "✓", wrong: "✗", no_answer: "∅", undecided: "?" };
const TYPES = ["thinking", "sub_task", "reflection", "hypothesis", "double_check", "reclarify", "answer"];

/** `sub_task` as people read it. */
export const words = (name: string): string => name.replaceAll("_", " ");

/** The CSS variable of a thought's colour: of a judged one that of its verdict, of others that of their type. */
export function colorName(type: string, verdict: Verdict | null): string {
  if (verdict) return `--${verdict.replace("_", "-")}`;
  return TYPES.includes(type) ? `--${type.replace("_", "-")}` : "--own";
}

export class Tree {
  readonly size: number;
  readonly parent: Int32Array;  // -1 for the root; parents stand before their children
  readonly visits: Float32Array;
  readonly order: Int32Array;  // of growth, 0 for the root
  readonly color: Uint8Array;  // an index into `colors`
  readonly colors: string[] = [];
  readonly first: Int32Array;  // child, -1 for none
  readonly next: Int32Array;  // sibling, -1 for none
  readonly last: Int32Array;  // child
  readonly types = new Set<string>();  // but those of judged thoughts
  readonly writers: string[];
  readonly uses = new Map<number, (Use & { dataset: string })[]>();
  private readonly column: Record<string, number> = {};
  private readonly places = new Map<number, number>();

  constructor(readonly json: TreeJson) {
    json.columns.forEach((name, place) => { this.column[name] = place; });
    const { id, parent, visits, order, type, verdict, model } = this.column;
    this.size = json.thoughts.length;
    this.parent = new Int32Array(this.size).fill(-1);
    this.visits = new Float32Array(this.size);
    this.order = new Int32Array(this.size);
    this.color = new Uint8Array(this.size);
    this.first = new Int32Array(this.size).fill(-1);
    this.next = new Int32Array(this.size).fill(-1);
    this.last = new Int32Array(this.size).fill(-1);
    const known = new Map<string, number>();
    const writers = new Set<string>();
    json.thoughts.forEach((row, i) => {
      this.places.set(Number(row[id]), i);
      const above = row[parent] === null ? -1 : this.places.get(Number(row[parent])) ?? -1;
      if (above >= 0) {
        this.parent[i] = above;
        if (this.first[above] < 0) this.first[above] = i;
        else this.next[this.last[above]] = i;
        this.last[above] = i;
      }
      this.visits[i] = row[visits] as number;
      this.order[i] = row[order] as number;
      if (i && !row[verdict]) this.types.add(row[type] as string);
      const name = i ? colorName(row[type] as string, row[verdict] as Verdict | null) : "--ink";
      if (!known.has(name)) known.set(name, this.colors.push(name) - 1);
      this.color[i] = known.get(name)!;
      if (row[model]) writers.add(row[model] as string);
    });
    this.writers = [...writers];
    for (const [dataset, uses] of Object.entries(json.chosen)) {
      for (const use of uses) {
        const leaf = this.place(use.leaf);
        if (leaf !== undefined) this.uses.set(leaf, [...(this.uses.get(leaf) ?? []), { ...use, dataset: dataset.replace("datasets/", "") }]);
      }
    }
  }

  /** The index of a thought by its id. */
  place(id: string | number | null): number | undefined {
    return id === null ? undefined : this.places.get(Number(id));
  }

  /** The children of a thought, in the order in which they were written. */
  children(i: number): number[] {
    const found: number[] = [];
    for (let child = this.first[i]; child >= 0; child = this.next[child]) found.push(child);
    return found;
  }

  field<K extends keyof Thought>(i: number, name: K): Thought[K] {
    return this.json.thoughts[i][this.column[name]] as Thought[K];
  }

  /** All that is known of a thought. */
  thought(i: number): Thought {
    const found = Object.fromEntries(this.json.columns.map((name, place) => [name, this.json.thoughts[i][place]]));
    return { prefix: "", detail: "", ...found, id: String(found.id), type: found.type ?? "question" } as unknown as Thought;
  }

  /** The words of a thought in one line, at most 300 characters; of the root those of the question. */
  line(i: number): string {
    const { messages } = this.json;
    const text = i ? this.field(i, "text") : messages[messages.length - 1]?.content ?? this.json.question;
    return text.slice(0, 300).replace(/[\s\p{Cc}\p{Cf}]+/gu, " ").trim();
  }

  /** The indices from the first thought below the root down to `i`. */
  chain(i: number): number[] {
    const found: number[] = [];
    for (let step = i; step > 0; step = this.parent[step]) found.push(step);
    return found.reverse();
  }

  /** The judged leaf that stands for the tree: one that a pair chose or a dataset took, else a correct or other one. */
  best(): number {
    for (const as of ["chosen", "chain"]) {
      const taken = [...this.uses].filter(([, uses]) => uses.some((use) => use.as === as)).map(([leaf]) => leaf);
      if (taken.length) return Math.min(...taken);
    }
    const place = this.column.verdict;
    const first = (verdict: Verdict) => this.json.thoughts.findIndex((row) => row[place] === verdict);
    return VERDICTS.map(first).find((leaf) => leaf > 0) ?? 0;
  }
}
