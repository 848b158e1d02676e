"""A model of the hub (one on loopback): pinned, searched with, trained and evaluated without a GGUF of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.support.experiment import small
from tests.support.fake_hub import FakeHub, fake_hub
from tests.support.fake_server import FakeServerThread
from tests.support.tiny_student import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

COMMITS = ("a" * 40, "b" * 40)


def tiny_folder(folder: Path, seed: int = 0) -> Path:
    """A tiny llama as the hub has models: bf16, in several files, with files that nobody needs."""
    model = tiny_model(seed=seed, max_position_embeddings=4096).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(folder)
    assert len([*folder.glob("model-*.safetensors")]) > 1
    (folder / "README.md").write_text("a card")
    (folder / "consolidated.safetensors").write_bytes(b"another format of the same")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    folder = tmp_path_factory.mktemp("hub")
    first = {COMMITS[0]: tiny_folder(folder / "first")}
    with fake_hub({"owner/tiny": first, "owner/other": {COMMITS[0]: folder / "first", COMMITS[1]: folder}}) as found:
        yield found


def cotree(*arguments: object, hub: FakeHub, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, with caches below `home`."""
    return subprocess.run(
        [sys.executable, "-m", "cotree.cli", *map(str, arguments)],
        cwd=home,
        env=os.environ | places(hub, home) | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def places(hub: FakeHub, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "cache")}


def one_arm(url: str, weights: str) -> dict[str, Any]:
    written = small(url, Path(weights))
    written["students"] = {"sft": written["students"]["sft"] | {"save_dtype": "bf16"}}
    del written["datasets"]["unverified"], written["datasets"]["pairs_long"], written["datasets"]["pairs"]
    written["evaluations"]["test"]["models"] = ["tiny", "sft"]
    return written


def test_from_search_to_table_with_a_model_of_the_hub(hub: FakeHub, server: FakeServerThread, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(one_arm(server.url, "owner/tiny")))
    planned = cotree("plan", recipe, hub=hub, home=tmp_path)
    assert planned.returncode == 0 and "unresolved" in planned.stdout and hub.asked == []

    done = cotree("run", recipe, hub=hub, home=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "steps"
    pinned = f"owner/tiny@{COMMITS[0]}"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["models"]["tiny"]["weights"] == pinned
    assert not [path for path in hub.asked if path.endswith((".md", "consolidated.safetensors"))]
    rows = json.loads((run / "summary.json").read_text())["eval"]
    assert [(row["model"], row["n"]) for row in rows] == [("tiny", 1), ("sft", 1)]

    # The student as its users load it, readable by all who may read new files.
    folder = run / "students" / "sft" / "model"
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(folder).chat_template
    fresh = tmp_path / "fresh"
    fresh.touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {fresh.stat().st_mode}


@pytest.mark.slow
def test_a_run_with_a_model_of_the_hub_needs_no_network_later(
    hub: FakeHub, server: FakeServerThread, tmp_path: Path
) -> None:
    """And a folder of the same content makes the same student."""
    recipe, run = tmp_path / "r.yaml", tmp_path / "runs" / "steps"
    recipe.write_text(yaml.safe_dump(one_arm(server.url, "owner/tiny")))
    assert cotree("run", recipe, hub=hub, home=tmp_path).returncode == 0
    again = cotree("run", recipe, hub=hub, home=tmp_path, HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and "begins" not in again.stdout, again.stdout + again.stderr
    recipe.write_text(yaml.safe_dump(one_arm(server.url, str(hub.repos["owner/tiny"][COMMITS[0]]))))
    local = cotree("run", recipe, "--from", run, "name=local", hub=hub, home=tmp_path)
    assert local.returncode == 0 and "begins" not in local.stdout, local.stdout + local.stderr


LOCATE = """
import sys
from cotree.base.errors import UsageError
from cotree.models.weights import locate
for name in sys.argv[1:]:
    try:
        print(locate(name))
    except UsageError as error:
        print(error)
"""


def test_faults_of_a_model_of_the_hub_are_one_line(hub: FakeHub, tmp_path: Path) -> None:
    kept = f"owner/other@{COMMITS[0]}"
    asked = ("owner/none", "owner/tiny@v9", "owner/other", "owner/gated", kept)
    none, revision, bare, gated, found = located(*asked, hub=hub, home=tmp_path)
    assert gated == (
        "owner/gated is not here, and cannot be got from the hub: access is refused; accept its licence on its page "
        "there, then run `hf auth login`, or give a path"
    )
    assert none == (
        "owner/none is not here, and cannot be got from the hub: there is no such model; correct the name, "
        "or give a path"
    )
    assert revision.startswith("owner/tiny is not here, and cannot be got from the hub: ")
    assert bare.startswith("owner/other has no config.json with model.safetensors or model.safetensors.index.json;")
    assert located(kept, hub=hub, home=tmp_path, HF_HUB_OFFLINE="1") == [found]
    next(Path(found).glob("model-00002-*")).unlink()
    (lacking,) = located(kept, hub=hub, home=tmp_path, HF_HUB_OFFLINE="1")
    assert lacking == "owner/other is not here, and the hub is not asked now (offline)"


def located(*names: str, hub: FakeHub, home: Path, **environment: str) -> list[str]:
    """Where each model is, or why it is not, in a process of its own."""
    command = [sys.executable, "-c", LOCATE, *names]
    done = subprocess.run(
        command, env=os.environ | places(hub, home) | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()
