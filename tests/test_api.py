"""The Python API: its names, and an import that loads nothing."""

from __future__ import annotations

import inspect
import pydoc
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import cotree


def test_the_names_are_frozen_and_there() -> None:
    assert cotree.__all__ == [
        "CotreeError",
        "Question",
        "Task",
        "UsageError",
        "Verdict",
        "WorkedExample",
        "__version__",
        "build_recipe",
        "compare",
        "decode",
        "diagnose",
        "evaluate",
        "load_recipe",
        "merge",
        "open_run",
        "plan",
        "run",
        "search_shard",
        "table",
        "task",
        "train",
    ]
    assert {name for name in dir(cotree) if not name.startswith("__")} == {*cotree.__all__} - {"__version__"}
    # Twice: some names are also those of subpackages, which their first use imports.
    for _ in range(2):
        assert all(callable(getattr(cotree, name)) for name in cotree.__all__ if name != "__version__")


def test_help_shows_every_name_with_its_first_sentence() -> None:
    text = pydoc.plain(pydoc.render_doc(cotree))
    assert cotree.__version__ in text
    for name in set(cotree.__all__) - {"__version__"}:
        first = (inspect.getdoc(getattr(cotree, name)) or "").split("\n")[0]
        assert first and first in text and name in text


def test_the_first_example_of_help_works(capsys: pytest.CaptureFixture[str]) -> None:
    _, example, *_ = re.split(r"\n(?=\S)", cotree.__doc__ or "", maxsplit=2)
    exec(textwrap.dedent(example.partition("\n")[2]))
    assert capsys.readouterr().out == "wrong 7\nTrue\n"


def test_a_missing_extra_is_named_and_the_rest_works() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import cotree, pydoc; assert not hasattr(cotree, 'train') and 'load_recipe' in pydoc.render_doc(cotree)\n"
        "try:\n    cotree.train\nexcept AttributeError as error:\n    print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "cotree.train cannot be used: torch is not installed; pip install 'cotree[local,train]'\n"


def test_the_package_says_that_it_has_types() -> None:
    assert (Path(cotree.__file__).parent / "py.typed").is_file()


def test_importing_and_judging_load_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "datasets", "pyarrow", "matplotlib", "numpy", "sympy", "pydantic"]
    code = (
        "import cotree, sys; assert 'cotree.tasks' not in sys.modules; task = cotree.task('letters');"
        "q = task.questions(limit=1)[0]; assert task.judge(q, '\\\\boxed{%s}' % q.gold).reward == 1.0;"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_paths_may_be_strings_and_one_name_needs_no_list(tmp_path: Path) -> None:
    """What a user types first: plain strings, and a name where a list of names could stand."""
    recipe = cotree.load_recipe(str(Path(__file__).parents[1] / "recipes" / "tour.yaml"))
    planned = {node.state for node in cotree.plan(recipe, str(tmp_path))}
    assert planned == {"new"}
    with pytest.raises(cotree.UsageError, match="unknown node `student`"):
        cotree.run(recipe, str(tmp_path), only="student")
    with pytest.raises(cotree.UsageError, match=r"no folder at .*nowhere"):
        cotree.table(str(tmp_path / "nowhere"))
    with pytest.raises(cotree.UsageError, match="no samples at "):
        cotree.compare(str(tmp_path), str(tmp_path))
    with pytest.raises(cotree.UsageError, match="unknown task `lettrs`"):
        cotree.evaluate("smollm2-135m-instruct", "lettrs")
