"""`cotree show`: list the trees of a run, or draw one tree in the terminal.

Control characters in model output are replaced, and nothing is parsed as markup.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from cotree.base.errors import UsageError
from cotree.base.numbers import counted, number
from cotree.base.progress import one_line, terminal_safe
from cotree.base.run_folder import RunFolder
from cotree.base.settings import nearest
from cotree.report.grid import terminal_table
from cotree.report.summary import natural_sort_key, read_recipe
from cotree.report.templates import sentence
from cotree.report.tree_view import Block, TreeView, trees_to_show, views_of

_TYPES = {"thinking": "default", "sub_task": "blue", "reflection": "yellow", "hypothesis": "magenta"}
_TYPES |= {"double_check": "cyan", "reclarify": "bright_blue"}
_OWN_TYPE = "bright_magenta"
_VERDICTS = {"correct": ("✓", "green"), "wrong": ("✗", "red"), "no_answer": ("∅", "yellow")}
_UNDECIDED = ("?", "yellow")
_ROLES = {"rejected": "red", "process-reward row": "default"}  # other roles are shown as accepted text
_TYPE_WIDTH, _WRITER_WIDTH = 14, 16  # of "double_check" and a mark; of a model's name, which the head has in full


def show_run(
    run: RunFolder, trees: str | None = None, question: str | None = None, best: bool = False
) -> RenderableType:
    """Render the list of a run's trees, or the trees of one question, for rich.

    Args:
        trees: the name of a trees node; by default all of the run's.
        question: the id of a question.
        best: instead of a question, pick the most instructive tree (`tree_view.trees_to_show`).

    Raises:
        UsageError: the run has no such trees, or no tree of that question.
    """
    written = list(read_recipe(run)["trees"])
    records = {name.partition("/")[2]: record for name, record in run.nodes().items() if name.startswith("trees/")}
    nodes = list(records)
    nodes.sort(key=lambda name: written.index(name) if name in written else len(written))
    if damaged := [name for name in run.damaged() if name.startswith(f"trees/{trees or ''}")]:
        raise UsageError(f"{run.path / damaged[0]}/node.json is damaged; `cotree run {run.path}` makes it again")
    if trees is not None and trees not in nodes:
        raise UsageError(f"{run.path} has no trees `{trees}`; {nearest(trees, nodes)}")
    wanted = nodes if trees is None else [trees]
    faults = [f"trees/{name}: {fault}" for name in wanted for fault in run.node(f"trees/{name}").faults(records[name])]
    lost = [f"{fault}; `cotree run {run.path}` makes it again" for fault in faults]
    views: list[TreeView] = []
    if best:
        views = trees_to_show(run, wanted, 1)
    if question is not None:
        views = list(views_of(run, wanted, question=question))
        if lost and not views:
            raise UsageError(lost[0])
        if not views:
            known = list(dict.fromkeys(view.tree.question_id for view in views_of(run, wanted)))
            raise UsageError(f"{run.path} has no tree of question `{question}`; {nearest(question, known[:20])}")
    if views:
        return Group(*map(drawn_tree, sorted(views, key=_sort_key)), Text(sentence("legend"), style="dim"))
    lists = [_tree_list(name, views_of(run, [name])) for name in wanted]
    if not lists:
        raise UsageError(f"{run.path} has no trees yet; grow them with `cotree run {run.path} --only trees`")
    return Group(*lists, *map(Text, lost))


def _sort_key(view: TreeView) -> tuple[str, str, list[tuple[float, str]], int]:
    """Sort key: node, task, question and turn."""
    return view.trees, view.tree.task, natural_sort_key(view.tree.question_id), view.tree.turn


def _tree_list(name: str, views: Iterable[TreeView]) -> RenderableType:
    """A table of one node's trees, one row per tree."""
    # Keeps only the cells in memory, so that a store of any size can be listed.
    rows = sorted((_sort_key(view), bool(view.uses), view.tree.question_id, _list_row(view)) for view in views)
    taken = [question for _, used, question, _ in rows if used]
    counts = f"{counted(len(rows), 'tree')}, {number(len(taken))} with chains in datasets"
    title = Text.assemble((f"trees/{one_line(name)}", "bold"), f"  {counts}\n")
    if not rows:
        return title
    marks = [mark for mark, _ in _VERDICTS.values()]
    table = terminal_table(("question", "task", "thoughts", *marks, "rollouts", "tokens", "in datasets"), 2, "top")
    table.columns[-1].justify = "left"
    styles = ("bold", "", "", *(style for _, style in _VERDICTS.values()), "", "", "")
    for _, _, _, cells in rows:
        table.add_row(*(Text(one_line(cell), style=style) for cell, style in zip(cells, styles, strict=True)))
    example = [*taken, rows[0][2]][0]
    return Group(title, table, Text(f"\n{sentence('list_legend', one_line(example))}\n", style="dim"))


def _list_row(view: TreeView) -> tuple[str, ...]:
    """A tree's cells in the list."""
    chains = (view.verdicts[verdict] for verdict in _VERDICTS)
    counts = (view.thoughts, *chains, view.tree.rollouts, view.tree.completion_tokens)
    return (view.name, view.tree.task, *map(number, counts), ", ".join(view.datasets) or "–")


def drawn_tree(view: TreeView) -> RenderableType:
    """Draw one tree: its question, then a line per thought with type, text, v/n and visits; branches are indented."""
    tree = view.tree
    title = Text.assemble((one_line(view.name), "bold"), f"  {one_line(tree.task)}, trees/{view.trees}")
    about = Text(one_line(sentence("about_tree", view)), style="dim")
    asked = Text(terminal_safe("\n\n".join(message["content"] for message in tree.messages)))
    gold = Text.assemble(("gold  ", "dim"), terminal_safe(tree.gold)) if tree.gold else Text("")
    question = [Padding(_wrapped(text), (0, 0, 0, 2)) for text in (asked, gold)]
    scale = Rule(Text("v/n  visits", style="dim"), align="right", style="dim")
    thoughts = Tree("", guide_style="dim", hide_root=True)
    for block in view.blocks():
        _draw(thoughts, block, len(view.writers) > 1)
    return Group(title, about, "", *question, scale, thoughts, "")


def _draw(into: Tree, block: Block, show_writer: bool) -> None:
    """Add a block's thoughts and branches: columns of type, text, writer (if there are several), v/n and visits."""
    table = Table.grid(expand=True, padding=(0, 1, 0, 0))
    table.add_column(width=_TYPE_WIDTH, no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    table.add_column(justify="right", no_wrap=True, max_width=_WRITER_WIDTH)
    table.add_column(justify="right", no_wrap=True)
    for thought in block.thoughts:
        node = thought.node
        mark, colour = "", _TYPES.get(str(node.type), _OWN_TYPE)
        if node.verdict is not None:
            mark, colour = _VERDICTS.get(node.verdict, _UNDECIDED)
        words = Text(terminal_safe(thought.prefix), style=f"{colour} dim")
        words.append(terminal_safe(node.text[len(thought.prefix) :]), style="not dim default")
        if thought.remark:
            words.append(f"  ({thought.remark})", style="dim")
        kind = Text(one_line(f"{node.type} {mark}"), style=f"bold {colour}")
        writer = Text(one_line(node.model) if show_writer else "", style="dim", overflow="ellipsis")
        numbers = Text(f"{node.value / node.visits:.2f}  {node.visits:>6}" if node.visits else "", style="dim")
        table.add_row(kind, words, writer, numbers)
        for use in thought.uses:
            style = _ROLES.get(use.role, "green")
            taken = (one_line(f"→ {use.role} in {use.dataset}"), f"bold {style}")
            table.add_row("", _wrapped(Text.assemble(taken, (one_line(f": {use.why}"), style))))
    place = into.add(table)
    for branch in block.branches:
        _draw(place, branch, show_writer)


def _wrapped(words: Text) -> Text:
    """Text that wraps even if the output is not a terminal, where rich would truncate it inside a frame."""
    words.no_wrap, words.overflow = False, "fold"
    return words
