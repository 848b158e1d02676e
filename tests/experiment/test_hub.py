"""Datasets of the hub: their newest commit is pinned in the run's recipe, and later runs keep it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.experiment import changed_recipe, small

from cotree.base.errors import UsageError
from cotree.base.run_folder import RunFolder
from cotree.experiment import hub
from cotree.experiment.fingerprints import Fingerprints
from cotree.experiment.hub import pinned
from cotree.experiment.plan import plan
from cotree.experiment.recipe import Recipe, build_recipe, load_recipe, recipe_yaml


class Hub:
    """A hub that knows one dataset; `asked` notes every question."""

    def __init__(self) -> None:
        self.commit, self.asked = "a" * 40, list[str]()

    def newest_commit(self, section: str, name: str) -> str:
        self.asked.append(name)
        return self.commit


@pytest.fixture
def the_hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(hub, "_newest_commit", found.newest_commit)
    return found


def recipe(student: Path, **more: Any) -> Recipe:
    written = small("http://127.0.0.1:9", student)
    written["datasets"]["sky"] = {"hub": "owner/sky", "rows": "sft", "tokenizer": "tiny"}
    return build_recipe(changed_recipe(written, *((key.replace("__", "."), value) for key, value in more.items())))


def keep(recipe: Recipe, folder: Path) -> None:
    """Write the run's recipe as `cotree run` does before it works."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe_yaml(recipe))


def test_a_revision_is_pinned_once(student: Path, tmp_path: Path, the_hub: Hub) -> None:
    run = RunFolder(tmp_path / "steps")
    first = pinned(recipe(student), run)
    assert first.nodes["datasets/sky"].settings.hub == f"owner/sky@{'a' * 40}"
    keep(first, run.path)
    written = yaml.safe_load((run.path / "recipe.yaml").read_text())
    assert written["datasets"]["sky"]["hub"] == f"owner/sky@{'a' * 40}"
    the_hub.commit = "b" * 40
    again = pinned(recipe(student, students__joint__alpha=0.5), run)
    prints = [Fingerprints(each).of("datasets/sky").of for each in (first, again)]
    assert prints[0] == prints[1], "the hub has newer rows, the run keeps its own"
    assert the_hub.asked == ["owner/sky"]
    other = pinned(recipe(student), RunFolder(tmp_path / "other"))
    assert other.nodes["datasets/sky"].settings.hub == f"owner/sky@{'b' * 40}"
    assert Fingerprints(other).of("datasets/sky").of != prints[0]


def test_a_given_revision_and_a_sweep_are_kept(student: Path, tmp_path: Path, the_hub: Hub) -> None:
    run = RunFolder(tmp_path / "steps")
    given = pinned(recipe(student, datasets__sky__hub="owner/sky@v1"), run)
    assert given.nodes["datasets/sky"].settings.hub == "owner/sky@v1" and the_hub.asked == []
    swept = {"rows": "sft", "tokenizer": "tiny", "sweep": {"hub": ["owner/sky", "owner/long@v2"]}}
    found = pinned(recipe(student, datasets__sky=swept), run)
    hubs = [node.settings.hub for node in found.of_kind("datasets") if node.entry == "sky"]
    assert hubs == [f"owner/sky@{'a' * 40}", "owner/long@v2"]
    keep(found, run.path)
    pinned(recipe(student, datasets__sky=swept), run)
    assert the_hub.asked == ["owner/sky"]


def test_the_plan_asks_nothing(student: Path, tmp_path: Path, the_hub: Hub) -> None:
    (sky,) = [node for node in plan(recipe(student), tmp_path) if node.name == "datasets/sky"]
    assert sky.state == "new" and sky.why[0].startswith("unresolved: owner/sky has no revision yet")
    assert the_hub.asked == []
    keep(pinned(recipe(student), RunFolder(tmp_path / "steps")), tmp_path / "steps")
    (sky,) = [node for node in plan(recipe(student), tmp_path) if node.name == "datasets/sky"]
    assert (sky.state, sky.why) == ("new", []) and the_hub.asked == ["owner/sky"]


def test_a_hub_that_is_not_reached_is_one_line(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda self, name, repo_type: 1 / 0)
    with pytest.raises(
        UsageError, match=r"cannot ask the hub for owner/sky: division by zero; .* give `file:` instead"
    ):
        pinned(recipe(student), RunFolder(tmp_path / "steps"))
    assert not list(tmp_path.iterdir())


OFFLINE = """
import os, sys
if "before" in sys.argv:
    import datasets.config, huggingface_hub.constants
from cotree.experiment.hub import offline
try:
    with offline():
        import datasets.config, huggingface_hub.constants
        assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"
        assert datasets.config.HF_DATASETS_OFFLINE and huggingface_hub.constants.HF_HUB_OFFLINE
        1 / 0
except ZeroDivisionError:
    assert "HF_HUB_OFFLINE" not in os.environ and os.environ["HF_DATASETS_OFFLINE"] == "0"
    assert not datasets.config.HF_DATASETS_OFFLINE and not huggingface_hub.constants.HF_HUB_OFFLINE
    print("as before")
"""


@pytest.mark.parametrize("loaded", ["before", "in the block"])
def test_offline_says_so_to_the_hubs_libraries_and_takes_it_back(loaded: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment["HF_DATASETS_OFFLINE"] = "0"
    command = [sys.executable, "-c", OFFLINE, loaded]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("as before\n", "")


def test_a_run_reads_its_pinned_recipe_back(student: Path, tmp_path: Path, the_hub: Hub) -> None:
    found = pinned(recipe(student), RunFolder(tmp_path / "steps"))
    keep(found, tmp_path / "steps")
    again = load_recipe(tmp_path / "steps" / "recipe.yaml")
    assert again.nodes == found.nodes
