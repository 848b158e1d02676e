"""`--from`: a new run takes over what is equal in another, and nothing else."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from tests.support.fake_server import FakeServerThread

from cotree.base.atomic import write_text
from cotree.base.errors import UsageError
from cotree.base.progress import Output
from cotree.experiment.recipe import Recipe, load_recipe, recipe_yaml
from cotree.experiment.reuse import reusable, start_from
from cotree.experiment.run import run
from cotree.experiment.run_folder import RunFolder, open_run

LAPTOP = Path(__file__).parents[2] / "recipes" / "laptop.yaml"
ALL = ["search", "build", "train_sft", "train_dpo"]


def finished(path: Path, stages: list[str]) -> Recipe:
    """A run folder in which stages are done."""
    recipe = load_recipe(LAPTOP, ["name=old"])
    run = RunFolder(path, recipe)
    for stage in stages:
        with run.stage(stage) as result:
            result["of"] = stage
    for name in ("base", "base+examples", "sft", "control", "dpo"):
        write_text(path / "eval" / f"samples_{name}.jsonl", f"{name}\n")
    write_text(path / "recipe.yaml", recipe_yaml(recipe))
    with sqlite3.connect(path / "trees.db") as db:
        db.execute("CREATE TABLE trees (id)")
    for name in ("data/sft/train.parquet", "samples.json", "checkpoints/sft/model/w", "checkpoints/dpo/model/w"):
        write_text(path / name, name)
    (path / ".lock").touch()
    return recipe


@pytest.mark.parametrize(
    ("override", "taken"),
    [
        ("seed=0", ALL),
        ("eval.max_tokens=64", ALL),
        ("train.dpo.beta=0.3", ALL[:3]),
        ("train.sft.epochs=1", ALL[:2]),
        ("tasks.eval.letters=5", ALL[:1]),
        ("build.dpo.length=longest", ALL[:1]),
    ],
)
def test_it_takes_over_what_is_equal(override: str, taken: list[str], tmp_path: Path) -> None:
    finished(tmp_path / "old", [*ALL, "eval"])
    recipe = load_recipe(LAPTOP, ["name=new", override])
    assert reusable(tmp_path / "old", recipe) == taken
    start_from(tmp_path / "old", tmp_path / "new", recipe, taken)
    with open_run(tmp_path, recipe) as new:
        assert [stage for stage in [*ALL, "eval"] if new.done(stage)] == taken
        assert all(new.result(stage) == {"of": stage} for stage in taken)
        assert new.manifest["stages"]["search"]["from"] == "old"
    files = {
        "trees.db": "search", "data/sft/train.parquet": "build", "samples.json": "build",
        "checkpoints/sft/model/w": "train_sft", "checkpoints/dpo/model/w": "train_dpo",
    }  # fmt: skip
    assert [name for name in files if (tmp_path / "new" / name).exists()] == [n for n, s in files.items() if s in taken]
    # What models of equal weights answered in the same evaluation.
    trained = {3: ["sft", "control"], 4: ["sft", "control", "dpo"]}
    same = ["base", "base+examples", *trained.get(len(taken), [])] if not override.startswith(("eval", "tasks")) else []
    answers = {path.name: path for path in (tmp_path / "new" / "eval").glob("*")}
    assert set(answers) == {f"samples_{name}.jsonl" for name in same}
    for name, path in answers.items():  # copies, which are appended to
        path.write_text("more")
        assert (tmp_path / "old" / "eval" / name).read_text() != "more"
    with sqlite3.connect(tmp_path / "new" / "trees.db") as db:  # a copy: the old run stays as it is
        db.execute("INSERT INTO trees VALUES (1)")
    with sqlite3.connect(tmp_path / "old" / "trees.db") as db:
        assert db.execute("SELECT * FROM trees").fetchall() == []
    assert not list(tmp_path.rglob(".*.draft"))


def test_an_evaluation_that_has_not_ended_is_not_taken_over(tmp_path: Path) -> None:
    finished(tmp_path / "old", ALL)
    start_from(tmp_path / "old", tmp_path / "new", load_recipe(LAPTOP, ["name=new"]), ALL)
    assert not (tmp_path / "new" / "eval").exists()


def test_what_cannot_be_taken_over_is_said(tmp_path: Path) -> None:
    recipe = finished(tmp_path / "old", [])
    with pytest.raises(UsageError, match="its search has not finished"):
        reusable(tmp_path / "old", recipe)
    with pytest.raises(
        UsageError, match=r"different: search\.rollouts, tasks\.train\.letters; its own .*old/recipe\.yaml"
    ):
        reusable(tmp_path / "old", load_recipe(LAPTOP, ["search.rollouts=3", "tasks.train.letters=2"]))
    with pytest.raises(UsageError, match="no run folder there"):
        reusable(tmp_path, recipe)
    with open_run(tmp_path, recipe), pytest.raises(UsageError, match="another cotree works in"):
        start_from(tmp_path / "old", tmp_path / "new", recipe, ["search"])
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.rglob(".*.draft"))


def test_a_run_from_another_asks_no_model_again(tmp_path: Path) -> None:
    with FakeServerThread(chat_only=True) as server:
        far = [f"models.far={{url: '{server.url}', model: fake, mode: chat}}", "roles={thinker: far}"]
        old = load_recipe(LAPTOP, [*far, "tasks.train={letters: 2}"])
        run(old, tmp_path, only="search", output=Output(quiet=True))
        asked = server.calls
        new = load_recipe(LAPTOP, [*far, "tasks.train={letters: 2}", "train.dpo.beta=0.3", "name=new"])
        for _ in range(2):  # the second time it is there, and goes on
            folder = run(new, tmp_path, only="search", start=tmp_path / "laptop", output=Output(quiet=True))
        assert server.calls == asked > 0
    stages = [json.loads((tmp_path / name / "manifest.json").read_text())["stages"] for name in ("laptop", "new")]
    assert stages[0]["search"] | {"from": "laptop"} == stages[1]["search"]
    assert folder == tmp_path / "new"
