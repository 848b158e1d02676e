/** A tree on a canvas: what is in the window is drawn, in as much detail as a row has room for. No requests, no state
 *  but its own, so that the viewer's page and the report show trees with the same code. */
import { h, visible } from "./dom";
import { type Layout, layOut, shownEdges, shownRows } from "./layout";
import { MARKS, type Tree } from "./tree";

const CARD = 26;  // pixels of a row from which on a thought is a card of several lines
const LINE = 12.5;  // ... from which on it has one line of text; below it is a dot
const USUAL = 92;
const TALLEST = 150;
const GAP = 34;  // pixels between a card and the next column
const ROOT = 30;  // pixels of the root's column: it is a dot, for the question stands in the panel

export interface Callbacks {
  select(thought: number, beside: boolean): void;
  /** Of the search as it grew: how many of the thoughts are shown. */
  played?(shown: number): void;
}

export class TreeCanvas {
  readonly element: HTMLCanvasElement;
  private layout: Layout;
  private readonly collapsed = new Set<number>();
  private readonly context: CanvasRenderingContext2D;
  private readonly onPath: Uint8Array;
  private selected = 0;
  private width = 1;
  private height = 1;
  private rowHeight = 40;
  private left = 0;  // of the window, in pixels of the drawing
  private top = 0;
  private upTo = Infinity;  // thoughts of a later order are not drawn
  private onPaper = false;
  private playing = 0;
  private frame = 0;
  private colors: Record<string, string> = {};
  private readonly pointers = new Map<number, { x: number; y: number }>();
  private moved = 0;
  private readonly fitted = new Map<string, { text: string; width: number }>();

  constructor(private readonly tree: Tree, private readonly callbacks: Callbacks) {
    this.layout = layOut(tree, this.collapsed);
    this.onPath = new Uint8Array(tree.size);
    this.element = h("canvas", {
      class: "tree", tabindex: 0, role: "application", "aria-label": `Tree of ${tree.size - 1} thoughts; arrow keys move`,
      onpointerdown: (event: PointerEvent) => this.press(event), onpointermove: (event: PointerEvent) => this.drag(event),
      onpointerup: (event: PointerEvent) => this.release(event), onkeydown: (event: KeyboardEvent) => this.key(event),
      onpointercancel: (event: PointerEvent) => this.pointers.delete(event.pointerId),
      ondblclick: (event: MouseEvent) => this.toggle(this.at(event.offsetX, event.offsetY)),
    });
    this.element.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    this.context = this.element.getContext("2d", { alpha: false })!;
    new ResizeObserver(() => this.resize()).observe(this.element);
  }

  /** Draw in the colours that the page has now. */
  restyle(): void {
    this.readColors();
    this.draw();
  }

  private readColors(): void {
    const names = [...this.tree.colors, "--page", "--card", "--ink", "--muted", "--rule", "--accent"];
    const probes = names.map((name) => h("span", { "--t": `var(${name})` }));
    const probe = h("span", { class: "probe" }, probes);
    this.element.parentElement!.append(probe);
    names.forEach((name, place) => { this.colors[name] = getComputedStyle(probes[place]).color; });
    probe.remove();
  }

  /** Show the whole tree, or, where that leaves no room for words, all its rows as dots. */
  fit(): void {
    this.rowHeight = Math.min(USUAL, (this.height - 24) / this.layout.rows);
    this.left = -16;
    this.top = -(this.height - this.layout.rows * this.rowHeight) / 2;
    this.redraw();
  }

  /** Select a thought, mark its chain, and bring it into the window. */
  select(thought: number, show = true): void {
    this.selected = thought;
    this.mark([thought]);
    if (show && this.width > 1) {
      const x = this.x(this.layout.depth[thought]);
      const y = this.y(this.layout.row[thought]);
      if (y < 20 || y > this.height - 20) this.top += y - this.height / 2;
      if (x < 0) this.left += x - 16;
      if (x + Math.min(this.columnWidth, this.width) > this.width) this.left += x + Math.min(this.columnWidth, this.width - 20) - this.width;
    }
    this.redraw();
  }

  /** Mark the chains that end in these thoughts, and open what hides them. */
  mark(ends: number[]): void {
    this.onPath.fill(0);
    for (const end of ends) {
      for (let step = end; step >= 0; step = this.tree.parent[step]) {
        this.onPath[step] = 1;
        if (step !== end && this.collapsed.delete(step)) this.layout = layOut(this.tree, this.collapsed);
      }
    }
    this.redraw();
  }

  /** Hide or show what is below a thought. */
  toggle(thought: number): void {
    if (thought < 0 || this.tree.first[thought] < 0) return;
    if (!this.collapsed.delete(thought)) this.collapsed.add(thought);
    const before = this.y(this.layout.row[thought]);
    this.layout = layOut(this.tree, this.collapsed);
    this.top += this.y(this.layout.row[thought]) - before;
    if (this.layout.depth[this.selected] < 0) this.callbacks.select(thought, false);
    this.redraw();
  }

  /** Show the thoughts that were there when the search had so many. */
  showUpTo(thoughts: number): void {
    this.upTo = thoughts;
    this.redraw();
  }

  /** Play the search in the order of its growth, in at most 20 seconds; or stop. */
  play(): boolean {
    if (this.playing) {
      clearInterval(this.playing);
      this.playing = 0;
      return false;
    }
    const last = this.tree.size - 1;
    const step = Math.max(1, Math.ceil(last / 200));
    let now = this.upTo >= last ? 0 : this.upTo;
    this.playing = window.setInterval(() => {
      now = Math.min(now + step, last);
      this.showUpTo(now);
      this.callbacks.played?.(now);
      if (now === last) this.play();
    }, Math.min(400, 20_000 / (last / step)));
    return true;
  }

  zoom(factor: number, x = this.width / 2, y = this.height / 2): void {
    const column = (x + this.left - ROOT) / this.columnWidth;
    const row = (y + this.top) / this.rowHeight;
    const least = Math.min(8, (this.height - 24) / this.layout.rows);
    this.rowHeight = Math.min(TALLEST, Math.max(least, this.rowHeight * factor));
    this.left = column * this.columnWidth + ROOT - x;
    this.top = row * this.rowHeight - y;
    this.redraw();
  }

  pan(x: number, y: number): void {
    const keep = 60;  // pixels of the drawing stay in the window
    this.left = clamp(this.left + x, keep - this.width, this.x(this.layout.columns.length) + this.left - keep);
    this.top = clamp(this.top + y, keep - this.height, this.layout.rows * this.rowHeight - keep);
    this.redraw();
  }

  /** Columns share the window's width as long as their words have room, and widen with rows that are taller than usual. */
  private get columnWidth(): number {
    const shared = (this.width - ROOT - 20) / Math.max(1, this.layout.columns.length - 1);
    const least = this.rowHeight < LINE ? 24 : this.onPaper ? 90 : 186;
    return Math.max(least, Math.min(300, shared)) + Math.max(0, 3 * (this.rowHeight - USUAL));
  }

  private x = (depth: number): number => (depth && ROOT + (depth - 1) * this.columnWidth) - this.left;
  private y = (row: number): number => (row + 0.5) * this.rowHeight - this.top;

  private resize(): void {
    const { clientWidth, clientHeight } = this.element;
    if (!clientWidth || !clientHeight) return;
    const first = this.width === 1;
    this.width = clientWidth;
    this.height = clientHeight;
    this.element.width = Math.round(clientWidth * devicePixelRatio);
    this.element.height = Math.round(clientHeight * devicePixelRatio);
    this.onPaper = matchMedia("print").matches;
    if (this.onPaper) this.fit();
    if (first) {
      this.readColors();
      this.fit();
      // A tree of a few screens opens where its words can be read; a larger one as a whole.
      if (this.rowHeight < 34 && this.layout.rows * 34 < 4 * this.height) {
        this.zoom(34 / this.rowHeight, 0, 0);
        this.top = this.y(this.layout.row[this.selected]) + this.top - this.height / 2;
        this.left = -16;
      }
    }
    cancelAnimationFrame(this.frame);
    this.draw();
  }

  private redraw(): void {
    if (this.frame === 0 && this.width > 1) this.frame = requestAnimationFrame(() => this.draw());
  }

  private draw(): void {
    this.frame = 0;
    const { context } = this;
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    context.fillStyle = this.colors["--page"];
    context.fillRect(0, 0, this.width, this.height);
    const from = this.top / this.rowHeight - 1;
    const to = (this.top + this.height) / this.rowHeight;
    const depths = this.layout.columns.map((_, depth) => depth);
    const inWindow = depths.filter((depth) => this.x(depth + 1) >= 0 && this.x(depth - 1) <= this.width);
    for (const depth of inWindow) if (depth) this.drawEdges(depth, from, to);
    const cards = this.rowHeight < LINE ? [] : inWindow.filter((depth) => depth);
    this.drawDots(inWindow.filter((depth) => !cards.includes(depth)), from, to);
    for (const depth of cards) this.drawCards(depth, from, to);
    if (!performance.getEntriesByName("tree drawn").length) performance.mark("tree drawn");
  }

  /** Edges, thicker to a thought with more visits; the selected chain's last and in the accent colour. */
  private drawEdges(depth: number, from: number, to: number): void {
    const { context, tree } = this;
    const column = this.layout.columns[depth];
    const [start, end] = shownEdges(column, from, to);
    const right = this.x(depth);
    const left = this.rowHeight < LINE || depth === 1 ? this.x(depth - 1) : right - GAP;
    const middle = (left + right) / 2;
    const curved = end - start < 1500;
    const most = tree.visits[0] || 1;
    const paths = [new Path2D(), new Path2D(), new Path2D(), new Path2D()];
    let lastRow = NaN;
    let lastAbove = NaN;
    for (let place = start; place < end; place++) {
      const child = column.index[place];
      if (tree.order[child] > this.upTo) continue;
      const y1 = this.y(column.above[place]);
      const y2 = this.y(column.row[place]);
      // Edges that would cover each other's pixels are one.
      if (!this.onPath[child] && Math.abs(y2 - lastRow) < 0.7 && Math.abs(y1 - lastAbove) < 0.7) continue;
      [lastRow, lastAbove] = [y2, y1];
      const weight = tree.visits[child] / most;
      const path = paths[this.onPath[child] ? 3 : weight > 0.4 ? 2 : weight > 0.1 ? 1 : 0];
      path.moveTo(left, y1);
      if (curved) path.bezierCurveTo(middle, y1, middle, y2, right, y2);
      else path.lineTo(right, y2);
    }
    [1, 2, 3.2, 2.2].forEach((width, place) => {
      context.lineWidth = end - start > 1500 && place < 3 ? 0.6 : width;
      context.strokeStyle = this.colors[place === 3 ? "--accent" : "--rule"];
      context.stroke(paths[place]);
    });
  }

  private radius(thought: number): number {
    const share = Math.sqrt(this.tree.visits[thought] / (this.tree.visits[0] || 1));
    return 2 + share * 5;
  }

  /** Thoughts as dots, of those in one row of pixels the first. */
  private drawDots(depths: number[], from: number, to: number): void {
    const { tree, context } = this;
    const dots = tree.colors.map(() => new Path2D());
    const marked = new Path2D();
    for (const depth of depths) {
      const column = this.layout.columns[depth];
      const [start, end] = shownRows(column, from, to);
      const x = this.x(depth);
      let last = -Infinity;
      for (let place = start; place < end; place++) {
        const i = column.index[place];
        const y = this.y(column.row[place]);
        if (tree.order[i] > this.upTo || (y - last < 0.9 && !this.onPath[i])) continue;
        last = y;
        const room = Math.max(this.rowHeight * 0.45, 0.5);
        const radius = tree.first[i] >= 0 ? Math.max(Math.min(this.radius(i), 7), 1) : Math.max(Math.min(this.radius(i), room), 1);
        if (radius < 1.6) dots[tree.color[i]].rect(x - 2, y - radius, 5, 2 * radius);
        else circle(dots[tree.color[i]], x, y, radius);
        if (this.onPath[i]) circle(marked, x, y, radius + 2.5);
      }
    }
    dots.forEach((path, color) => {
      context.fillStyle = this.colors[tree.colors[color]];
      context.fill(path);
    });
    context.strokeStyle = this.colors["--accent"];
    context.lineWidth = 2;
    context.stroke(marked);
  }

  /** Thoughts of one column as cards: a dot, the type, v/n and visits, and as many lines as there is room for. */
  private drawCards(depth: number, from: number, to: number): void {
    const { tree, context } = this;
    const column = this.layout.columns[depth];
    const [start, end] = shownRows(column, from, to);
    const width = this.columnWidth - GAP;
    const left = this.x(depth);
    const lines = Math.floor((this.rowHeight - CARD) / 15);
    const tall = this.rowHeight >= CARD;
    context.textBaseline = "middle";
    for (let place = start; place < end; place++) {
      const i = column.index[place];
      if (tree.order[i] > this.upTo) continue;
      const y = this.y(column.row[place]);
      const words = tall ? this.wrapped(i, width - 18, lines) : [];
      const height = 22 + 15 * words.length + (words.length ? 4 : 0);
      const top = y - height / 2;
      const color = this.colors[tree.colors[tree.color[i]]];
      const thought = tree.thought(i);
      if (tall) {
        context.beginPath();
        context.roundRect(left, top, width, height, 5);
        context.fillStyle = this.colors["--card"];
        context.fill();
        context.lineWidth = i === this.selected ? 2 : 1;
        context.strokeStyle = this.colors[i === this.selected || this.onPath[i] ? "--accent" : "--rule"];
        context.stroke();
      }
      const line = tall ? top + 12 : y;
      context.fillStyle = color;
      const dot = new Path2D();
      circle(dot, left + 10, line, Math.min(this.radius(i), tall ? 7 : 5));
      context.fill(dot);
      if (!tall && this.onPath[i]) {
        context.lineWidth = 1.5;
        context.strokeStyle = this.colors["--accent"];
        context.stroke(dot);
      }
      const hidden = this.collapsed.has(i) ? `+${tree.children(i).length} ▸` : "";
      const uses = tree.uses.get(i)?.map((use) => (use.as === "rejected" ? "◇" : "◆")).join("") ?? "";
      const numbers = tall && thought.visits ? `${(thought.value / thought.visits).toFixed(2)} · ${thought.visits}` : "";
      const right = [uses, hidden, numbers].filter(Boolean).join("  ");
      const used = this.write(right, left + width - 8, line, width, "11px", this.colors["--muted"], true);
      const mark = thought.verdict ? ` ${MARKS[thought.verdict]}` : "";
      const writer = tall && tree.writers.length > 1 && thought.model ? `  ${shortName(thought.model)}` : "";
      const room = width - 34 - used;
      if (tall) {
        const typed = this.write(thought.type.replaceAll("_", " ") + mark, left + 21, line, room, "600 11px", color);
        if (writer) this.write(writer, left + 21 + typed, line, room - typed, "11px", this.colors["--muted"]);
        words.forEach((text, at) => this.write(text, left + 10, top + 30 + 15 * at, width - 18, "12px", this.colors["--ink"]));
      } else {
        const typed = mark ? this.write(mark.trim(), left + 20, line, 14, "600 11px", color) + 4 : 0;
        const written = this.write(tree.line(i), left + 20 + typed, line, room - typed, "11px", this.colors["--ink"]);
        if (tree.first[i] >= 0 && !hidden) {
          context.fillStyle = this.colors["--rule"];
          context.fillRect(left + 26 + typed + written, line, Math.max(0, width - 26 - typed - written), 1);
        }
      }
    }
  }

  /** The words of a thought in at most so many lines, of which the last may be too long. */
  private wrapped(thought: number, width: number, most: number): string[] {
    const lines: string[] = [];
    let text = this.tree.line(thought);
    while (text && lines.length < most - 1) {
      const fitting = this.fitting(text, width, "12px").text;
      if (fitting === text) break;
      const space = text.lastIndexOf(" ", fitting.length - 1);
      const length = space > fitting.length / 2 ? space : Math.max(1, fitting.length - 1);
      lines.push(text.slice(0, length));
      text = text.slice(length).trimStart();
    }
    return text && most > 0 ? [...lines, text] : lines;
  }

  /** Write a text, cut with an ellipsis to its room; returns its width. */
  private write(words: string, x: number, y: number, room: number, font: string, color: string, toTheLeft = false): number {
    if (!words || room < 8) return 0;
    const text = visible(words);
    this.context.font = `${font} ${FONT}`;
    const fitting = this.fitting(text, room, font);
    this.context.fillStyle = color;
    this.context.fillText(fitting.text, toTheLeft ? x - fitting.width : x, y);
    return fitting.width;
  }

  private fitting(text: string, room: number, font: string): { text: string; width: number } {
    const key = `${font}|${Math.round(room)}|${text}`;
    const known = this.fitted.get(key);
    if (known) return known;
    this.context.font = `${font} ${FONT}`;
    let width = this.context.measureText(text).width;
    let cut = text;
    for (let length = text.length; width > room && length > 1;) {
      length = Math.min(length - 1, Math.floor((length * room) / width));
      cut = `${text.slice(0, length)}…`;
      width = this.context.measureText(cut).width;
    }
    if (this.fitted.size > 5000) this.fitted.clear();
    this.fitted.set(key, { text: cut, width });
    return { text: cut, width };
  }

  /** The thought at a place of the window, or -1. */
  private at(x: number, y: number): number {
    const right = (x + this.left - ROOT) / this.columnWidth;
    const near = this.rowHeight < LINE ? Math.round(right) : Math.floor(right);
    const column = this.layout.columns[x + this.left < ROOT / 2 ? 0 : Math.max(0, near) + 1];
    if (!column) return -1;
    const row = (y + this.top) / this.rowHeight - 0.5;
    const within = Math.max(0.5, 6 / this.rowHeight);
    const [start, end] = shownRows(column, row - within, row + within);
    let best = -1;
    for (let place = start; place < end; place++) {
      const better = best < 0 || Math.abs(column.row[place] - row) < Math.abs(this.layout.row[best] - row);
      if (better && this.tree.order[column.index[place]] <= this.upTo) best = column.index[place];
    }
    return best;
  }

  private press(event: PointerEvent): void {
    this.element.focus({ preventScroll: true });
    if (event.isTrusted) this.element.setPointerCapture(event.pointerId);
    if (!this.pointers.size) this.moved = 0;
    this.pointers.set(event.pointerId, { x: event.offsetX, y: event.offsetY });
  }

  private drag(event: PointerEvent): void {
    const before = this.pointers.get(event.pointerId);
    if (!before) {
      this.element.style.cursor = this.at(event.offsetX, event.offsetY) >= 0 ? "pointer" : "grab";
      return;
    }
    const now = { x: event.offsetX, y: event.offsetY };
    const other = [...this.pointers].find(([id]) => id !== event.pointerId)?.[1];
    if (other) {  // two fingers
      const apart = (point: { x: number; y: number }) => Math.max(20, Math.hypot(point.x - other.x, point.y - other.y));
      this.zoom(apart(now) / apart(before), (now.x + other.x) / 2, (now.y + other.y) / 2);
    }
    this.pan((before.x - now.x) / (other ? 2 : 1), (before.y - now.y) / (other ? 2 : 1));
    this.moved += Math.abs(before.x - now.x) + Math.abs(before.y - now.y);
    this.pointers.set(event.pointerId, now);
  }

  private release(event: PointerEvent): void {
    if (!this.pointers.delete(event.pointerId) || this.moved > 5 || this.pointers.size) return;
    const thought = this.at(event.offsetX, event.offsetY);
    if (thought >= 0) this.callbacks.select(thought, event.shiftKey);
  }

  private wheel(event: WheelEvent): void {
    // A page that scrolls goes on to do so over a canvas that nobody has turned to.
    const scrolls = document.scrollingElement!.scrollHeight > innerHeight;
    if (scrolls && !event.ctrlKey && document.activeElement !== this.element) return;
    event.preventDefault();
    const scale = event.deltaMode === 1 ? 20 : 1;
    if (event.shiftKey) this.pan(event.deltaY * scale, 0);
    else this.zoom(Math.exp(-event.deltaY * scale * 0.002), event.offsetX, event.offsetY);
  }

  /** Do what a key stands for. */
  key(event: KeyboardEvent): void {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    const { parent, first } = this.tree;
    const column = this.layout.columns[this.layout.depth[this.selected]].index;
    const place = column.indexOf(this.selected);
    const moves: Record<string, () => number | undefined> = {
      ArrowLeft: () => parent[this.selected],
      ArrowRight: () => (this.collapsed.has(this.selected) ? undefined : first[this.selected]),
      ArrowUp: () => column[place - 1],
      ArrowDown: () => column[place + 1],
    };
    const acts: Record<string, () => void> = {
      " ": () => this.toggle(this.selected), "+": () => this.zoom(1.3), "=": () => this.zoom(1.3), "-": () => this.zoom(1 / 1.3),
      "0": () => this.fit(),
    };
    if (event.key in moves) {
      const next = moves[event.key]();
      if (next !== undefined && next >= 0) {
        this.callbacks.select(next, false);
        this.select(next);
      }
    } else if (event.key in acts) acts[event.key]();
    else return;
    event.preventDefault();
  }
}

/** Call something when the system turns dark or light, and around printing. */
export function whenColorsChange(act: () => void): void {
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", act);
}

const FONT = 'ui-sans-serif, -apple-system, "Segoe UI", "Helvetica Neue", Arial, "Liberation Sans", sans-serif';

const clamp = (value: number, low: number, high: number): number => Math.max(low, Math.min(high, value));

function circle(path: Path2D, x: number, y: number, radius: number): void {
  path.moveTo(x + radius, y);
  path.arc(x, y, radius, 0, 2 * Math.PI);
}

/** A model's name without its owner: "Qwen/Qwen2.5-7B-Instruct" is "Qwen2.5-7B-Instruct". */
const shortName = (model: string): string => model.slice(model.lastIndexOf("/") + 1);
