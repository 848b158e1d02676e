/** What the viewer asks its server. */
import type { Annotation, TreeJson, Verdict } from "./tree";

export interface GraphNode { name: string; kind: string; state: string; reads: string[]; seconds: number | null; counts: Record<string, unknown> }
/** Places in pixels: the corner of each node's box by its name, and the paths between them. */
export interface Drawing { width: number; height: number; box: [number, number]; boxes: Record<string, [number, number]>; lines: string[] }
export interface Run {
  name: string; read_only: boolean; annotator: string | null; version: string; recipe: string; nodes: GraphNode[]; graph: Drawing;
  trees: { node: string; questions: number; thoughts: number }[]; datasets: string[];
  students: { name: string; parent: string; method: string }[];
  evaluations: { name: string; models: string[]; tasks: string[] }[];
}
export interface TreeRow {
  tree: string; question: string; task: string; text: string; correct: number; wrong: number; no_answer: number;
  undecided: number; depth: number; thoughts: number; tokens: number; reflection: "helped" | "failed" | null;
  forced: number; looped: number; annotated: number;
}
export interface TreeList { total: number; tasks: Record<string, number>; rows: TreeRow[] }
export interface Student { name: string; method: string; parent: string; curve: Record<string, unknown>[] }
export interface Table { title: string; header: string[]; rows: string[][]; note: string }
export interface Replies {
  total: number; gained: number; lost: number;
  rows: { question: string; text: string; gold: string; reply: string; verdict: Verdict; beside_reply: string; beside_verdict: Verdict }[];
}
export interface Agreement { rows: (Annotation & { tree: string })[]; agreement: { pairs: number; equal: number; kappa: number | null } }

/** An answer that is no success; `body` is its JSON. */
export class Refused extends Error {
  constructor(readonly status: number, readonly body: { error?: string } & Record<string, unknown>) {
    super(body.error ?? `the server answered ${status}`);
  }
}

async function answer<T>(response: Response): Promise<T> {
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refused(response.status, body);
  return body as T;
}

export async function get<T>(path: string, query: Record<string, string> = {}): Promise<T> {
  const given = Object.entries(query).filter(([, value]) => value !== "");
  const search = given.length ? `?${new URLSearchParams(given)}` : "";
  return answer<T>(await fetch(`/api/${path}${search}`));
}

export async function send<T>(method: "POST" | "DELETE", path: string, body: unknown): Promise<T> {
  const headers = { "Content-Type": "application/json" };
  return answer<T>(await fetch(`/api/${path}`, { method, headers, body: JSON.stringify(body) }));
}

export const treePath = (node: string, tree?: string): string =>
  ["trees", node, ...(tree === undefined ? [] : [tree])].map(encodeURIComponent).join("/");

export type { TreeJson };
