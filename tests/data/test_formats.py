"""Files in the forms of others: TRL's trainers take them as they are; exports, card, preview, checks."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tests.support.datasets import dataset_of
from tests.support.tiny_student import tiny_model, tiny_tokenizer
from tests.support.trees import random_tree

from cotree.base.errors import CotreeError, UsageError
from cotree.base.rows import read_rows, write_jsonl
from cotree.data.card import histogram
from cotree.data.export import export_to, export_trees
from cotree.data.kinds import check_file
from cotree.data.preview import preview
from cotree.eval.diagnose import diagnose_file
from cotree.search.store import TreeStore

TREES = [random_tree(seed) for seed in range(12)]
HOSTILE = "</pre><script>alert(1)</script>| ``` [x](javascript:1)\n# Known"
ABOUT = {"name": "cards & pairs", "models": {"m": "smollm2, apache-2.0"}, "recipe": "name: x # <b>"}
DATASETS: dict[str, dict[str, Any]] = {
    "sft": {"per_tree": 2},
    "dpo": {"per_tree": 2},
    "step_pairs": {"min_visits": 1},
    "stepwise": {"per_tree": 2},
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a dataset of each kind, and its trees."""
    run = tmp_path_factory.mktemp("run")
    for kind, given in DATASETS.items():
        folder = run / "datasets" / kind
        dataset_of(TREES, folder, kind, license="apache-2.0", passed={"about": ABOUT}, **given)
        (folder / "node.json").write_text("{}")
    (run / "trees" / "train").mkdir(parents=True)
    with TreeStore(run / "trees" / "train" / "trees.db") as store:
        for tree in TREES:
            store.put(tree)
    return run


@pytest.fixture(scope="module")
def folder(run_folder: Path) -> Path:
    return run_folder / "datasets"


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trls_trainers_train_on_a_file_as_it_is(folder: Path, tmp_path: Path, kind: str) -> None:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    rows = datasets.load_dataset("parquet", data_files=str(folder / kind / "train.parquet"), split="train",
                                 cache_dir=str(tmp_path / "cache"))  # fmt: skip
    options: dict[str, Any] = {
        "output_dir": str(tmp_path), "max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none",
        "use_cpu": True, "bf16": False, "max_length": None, "logging_steps": 1, "save_strategy": "no",
    }  # fmt: skip
    common = {"model": tiny_model(), "train_dataset": rows, "processing_class": tiny_tokenizer()}
    trainer = (
        SFTTrainer(args=SFTConfig(**options), **common)
        if kind == "sft"
        else DPOTrainer(args=DPOConfig(**options), ref_model=tiny_model(), **common)
    )
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    assert trainer.train().training_loss > 0
    assert any(not weight.equal(before[name]) for name, weight in trainer.model.named_parameters())


def test_llamafactory(folder: Path, tmp_path: Path) -> None:
    written = export_to(folder, "llamafactory", str(tmp_path))
    information = json.loads((tmp_path / "dataset_info.json").read_text())
    assert sorted(information) == ["cotree_dpo", "cotree_sft", "cotree_step_pairs"]
    assert len(written) == 5
    stepwise = folder / "stepwise" / "train.parquet"
    left_out = f"{stepwise} is left out: llamafactory trains no process rewards; export it --to jsonl"
    assert written[-1] == left_out
    with pytest.raises(UsageError, match=re.escape(left_out)):
        export_to(stepwise, "llamafactory", str(tmp_path))
    for entry in information.values():
        assert entry["formatting"] == "sharegpt"
        for row in read_rows(tmp_path / entry["file_name"]):
            roles = [m[entry["tags"]["role_tag"]] for m in row[entry["columns"]["messages"]]]
            # Its reader wants user and assistant in turn, and of a ranking both answers as one message each.
            assert roles == (["user"] if entry.get("ranking") else ["user", "assistant"])
            assert ("chosen" in row) == ("rejected" in row) == bool(entry.get("ranking"))
    dpo = next(read_rows(tmp_path / "dpo.jsonl"))
    original = next(read_rows(folder / "dpo" / "train.parquet"))
    assert (dpo["chosen"], dpo["rejected"]) == (original["chosen"][0], original["rejected"][0])


def test_a_side_that_was_cut_off_is_not_exported_as_a_whole_one(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "dpo.jsonl", [GOOD_PAIR | {"rejected_finished": False}])
    for form in ("llamafactory", "axolotl"):
        with pytest.raises(UsageError, match="was cut off by max_tokens"):
            export_to(tmp_path / "dpo.jsonl", form, str(tmp_path / form))
    export_to(tmp_path / "dpo.jsonl", "jsonl", str(tmp_path / "out"))
    assert next(read_rows(tmp_path / "out" / "dpo.jsonl"))["rejected_finished"] is False


def test_a_card_counts_only_what_it_has_and_a_licence_cannot_break_its_table(tmp_path: Path) -> None:
    about = {"models": {"m": "x\n\n# Free | [a](javascript:1)"}}
    dataset_of(TREES, tmp_path / "it", passed={"about": about})
    card = (tmp_path / "it" / "README.md").read_text()
    assert "rejected" not in card and "Mean tokens of a completion (the student's): " in card
    assert "| m | x # Free \\| \\[a\\](javascript:1) |" in card


def test_an_export_keeps_what_is_in_the_folder_already(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    information = tmp_path / "dataset_info.json"
    information.write_text('{"alpaca": {"file_name": "alpaca.json"}}')
    export_to(folder, "llamafactory", str(tmp_path))
    export_to(folder, "llamafactory", str(tmp_path))
    assert {"alpaca", "cotree_sft", "cotree_dpo"} <= json.loads(information.read_text()).keys()
    information.write_text("[")
    with pytest.raises(UsageError, match="is no JSON object"):
        export_to(folder, "llamafactory", str(tmp_path))
    write_jsonl(tmp_path / "own.jsonl", [GOOD_ROW])
    with pytest.raises(UsageError, match="a part of its path is a file, no folder; choose another place"):
        export_to(tmp_path / "own.jsonl", "jsonl", str(tmp_path / "own.jsonl" / "sub"))
    with pytest.raises(UsageError, match="would replace"):
        export_to(tmp_path / "own.jsonl", "jsonl", str(tmp_path))
    monkeypatch.chdir(folder / "sft")
    assert export_to(Path("train.parquet"), "jsonl", str(tmp_path)) == [str(tmp_path / "sft.jsonl")]


def test_axolotl(folder: Path, tmp_path: Path) -> None:
    export_to(folder / "sft" / "train.parquet", "axolotl", str(tmp_path))
    export_to(folder / "dpo" / "train.parquet", "axolotl", str(tmp_path))
    (sft,) = yaml.safe_load((tmp_path / "sft.yml").read_text())["datasets"]
    config = yaml.safe_load((tmp_path / "dpo.yml").read_text())
    (dpo,) = config["datasets"]
    assert (sft["type"], dpo["type"], config["rl"]) == ("chat_template", "chat_template.default", "dpo")
    assert [m["role"] for m in next(read_rows(tmp_path / sft["path"]))[sft["field_messages"]]] == ["user", "assistant"]
    row = next(read_rows(tmp_path / dpo["path"]))
    assert row[dpo["field_chosen"]]["role"] == row[dpo["field_rejected"]]["role"] == "assistant"


def test_json_lines_are_the_rows(folder: Path, tmp_path: Path) -> None:
    export_to(folder, "jsonl", str(tmp_path))
    for kind in ("sft", "dpo", "step_pairs", "stepwise"):
        assert list(read_rows(tmp_path / f"{kind}.jsonl")) == list(read_rows(folder / kind / "train.parquet"))
        assert check_file(tmp_path / f"{kind}.jsonl")[1] == len(list(read_rows(tmp_path / f"{kind}.jsonl")))
    with pytest.raises(UsageError, match="known: jsonl, llamafactory, axolotl, trees, annotations, hub"):
        export_to(folder, "csv", str(tmp_path))
    with pytest.raises(UsageError, match="no datasets in"):
        export_to(tmp_path, "jsonl", str(tmp_path))
    with pytest.raises(UsageError, match=re.escape("has no README.md with a train.parquet")):
        export_to(folder, "hub", "me/mine")
    with pytest.raises(UsageError, match="write it as -o OWNER/NAME"):
        export_to(folder / "sft", "hub", "mine")


def test_a_run_a_folder_of_datasets_one_dataset_and_a_file_are_exported_alike(
    run_folder: Path, folder: Path, tmp_path: Path
) -> None:
    everything = export_to(run_folder, "jsonl", str(tmp_path / "run"))
    assert [Path(line).name for line in everything] == ["dpo.jsonl", "sft.jsonl", "step_pairs.jsonl", "stepwise.jsonl"]
    export_to(folder, "jsonl", str(tmp_path / "folder"))
    assert export_to(folder / "sft", "jsonl", str(tmp_path / "one")) == [str(tmp_path / "one" / "sft.jsonl")]
    export_to(folder / "sft" / "train.parquet", "jsonl", str(tmp_path / "file"))
    same = {(tmp_path / place / "sft.jsonl").read_bytes() for place in ("run", "folder", "one", "file")}
    assert len(same) == 1


def test_a_hub_that_cannot_be_reached_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", away)
    with pytest.raises(CotreeError, match="cannot push to me/mine: no route; is the hub reached"):
        export_to(folder / "sft", "hub", "me/mine")


def test_a_push_has_the_dataset_and_nothing_of_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils._paths import filter_repo_objects

    pushed: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda _, **given: pushed.update(given) or "there")
    assert export_to(folder / "sft", "hub", "me/mine") == ["there"]
    files = [str(path.relative_to(folder / "sft")) for path in (folder / "sft").rglob("*") if path.is_file()]
    kept = set(filter_repo_objects(files, allow_patterns=pushed["allow_patterns"]))
    assert set(files) - kept == {"node.json"}


def test_trees_as_parquet_are_the_trees(run_folder: Path, tmp_path: Path) -> None:
    node = run_folder / "trees" / "train"
    for number, source in enumerate((node / "trees.db", node, run_folder)):
        out = tmp_path / f"{number}.parquet"
        assert export_to(source, "trees", str(out)) == [f"{out}: {len(TREES)} trees"]
    with pytest.raises(UsageError, match="no trees in"):
        export_to(run_folder / "datasets", "trees", str(tmp_path / "x"))
    assert export_trees(node / "trees.db", tmp_path / "trees.parquet") == len(TREES)
    found = pq.read_table(tmp_path / "trees.parquet").to_pylist()
    assert {row["tree_id"]: row for row in found} == {tree.tree_id: asdict(tree) for tree in TREES}


@pytest.mark.parametrize("kind", DATASETS)
def test_the_card_is_what_the_hub_reads(folder: Path, kind: str) -> None:
    from huggingface_hub import DatasetCard

    card = DatasetCard((folder / kind / "README.md").read_text())
    data: dict[str, Any] = card.data.__dict__
    assert (data["license"], data["size_categories"]) == ("apache-2.0", ["n<1K"])
    (config,) = yaml.safe_load(card.content.split("---")[1])["configs"]
    assert (folder / kind / config["data_files"]).is_file()
    figures = re.findall(r"\]\((figures/[^)]*)\)", card.text)
    assert "figures/pass_rate.svg" in figures and ("figures/value.svg" in figures) == (kind == "sft")
    for figure in figures:
        ElementTree.parse(folder / kind / figure)
    assert f"| arithmetic | {len(list(read_rows(folder / kind / 'train.parquet')))} |" in card.text
    assert "smollm2, apache-2.0" in card.text and "## Known limits" in card.text
    assert "# cards &amp; pairs: " in card.text
    assert "# &lt;b&gt;" in card.text and "<b>" not in card.text and "&amp;#" not in card.text


def test_text_of_a_model_cannot_break_out_of_the_card(tmp_path: Path) -> None:
    from dataclasses import replace

    trees = [replace(t, nodes=[replace(n, text=n.text + HOSTILE) if n.type else n for n in t.nodes]) for t in TREES]
    for kind, blocks in (("sft", 2), ("dpo", 3), ("stepwise", 2)):
        dataset_of(trees, tmp_path / kind, kind, max_tokens=4_000)
        text = (tmp_path / kind / "README.md").read_text()
        assert "<script" not in text and "&lt;script&gt;" in text
        assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1
        assert text.count("<pre>") == text.count("</pre>") == blocks


def test_a_histogram_counts_everything_once() -> None:
    bars = ElementTree.fromstring(histogram([1] * 5 + [2] * 10 + [30], "a < b")).iter(
        "{http://www.w3.org/2000/svg}rect"
    )
    heights = [float(bar.attrib["height"]) for bar in list(bars)[1:]]
    assert heights == [110.0, 7.3]
    ElementTree.fromstring(histogram([7], "one"))


GOOD_ROW = {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]}
GOOD_PAIR = {"prompt": GOOD_ROW["prompt"], "chosen": GOOD_ROW["completion"],
             "rejected": [{"role": "assistant", "content": "B"}]}  # fmt: skip
STEPS = {"prompt": "Q", "completions": ["a", "b"], "labels": [True, False]}


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        (GOOD_ROW, {"prompt": []}, "row 1, column prompt: List should have at least 1 item"),
        (GOOD_ROW, {"prompt": [{"role": "bot", "content": "Q"}]}, "column prompt.0.role: Input should be 'system', "),
        (GOOD_ROW, {"prompt": GOOD_ROW["completion"]}, "column prompt: must not end with the assistant"),
        (GOOD_ROW, {"completion": GOOD_ROW["prompt"]}, "column completion: must be exactly one assistant message"),
        (
            GOOD_ROW,
            {"completion": [{"role": "assistant", "content": " "}]},
            "column completion.0.content: String should have",
        ),
        (GOOD_ROW, {"length_tokens": -1}, "column length_tokens: Input should be greater than or equal to 0, not '-1'"),
        (GOOD_PAIR, {"chosen": None}, "row 1, column chosen: Input should be a valid list"),
        (GOOD_PAIR, {"rejected": GOOD_PAIR["chosen"]}, "row 1, column rejected: is the same as chosen"),
        (STEPS, {"labels": [True]}, "row 1, column labels: has 1 entries for 2 completions"),
        (STEPS, {"prompt": ""}, "row 1, column prompt: String should have at least 1 character"),
        (STEPS, {"completions": 5}, "row 1, column completions: Input should be a valid list, not '5'"),
        (STEPS, {"labels": 3}, "row 1, column labels: Input should be a valid list"),
        (STEPS, {"labels": ["yes", "no"]}, "row 1, column labels.0: Input should be a valid boolean"),
        (STEPS, {"visits": [1, "many"]}, "row 1, column visits.1: Input should be a valid integer"),
        (GOOD_ROW, {"reward": "high"}, "row 1, column reward: Input should be a valid number, not 'high'"),
        (GOOD_ROW, {"tree_id": 7}, "row 1, column tree_id: Input should be a valid string, not '7'"),
        (
            GOOD_PAIR,
            {"rejected_finished": "no"},
            "row 1, column rejected_finished: Input should be a valid boolean, not 'no'",
        ),
        (
            GOOD_PAIR,
            {"prefix_tokens": True},
            "row 1, column prefix_tokens: Input should be a valid integer, not 'True'",
        ),
    ],
)
def test_a_check_names_row_and_column(
    tmp_path: Path, row: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [row, row])
    assert check_file(path)[1] == 2
    write_jsonl(path, [row, row | change])
    with pytest.raises(UsageError, match=re.escape(message)):
        check_file(path)


def test_a_check_of_what_is_no_dataset(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.jsonl", b'{"a": 1}', "row 0 has the columns of no type"),
        ("b.jsonl", b"", "has no rows"),
        ("c.jsonl", json.dumps(GOOD_ROW).encode() + b"\n{", "line 2: no JSON row"),
        ("trees.db", b"SQLite format 3\x00\xd0", "line 1: no JSON row .*; rows come as .parquet, .jsonl"),
        ("d.parquet", b"PAR2", "is no Parquet file"),
        ("e.jsonl.gz", b"no gzip", "no JSON row"),
        ("f.jsonl.gz", gzip.compress(json.dumps(GOOD_ROW).encode())[:-12], "no JSON row"),
        ("g.json", b"5", "a row must be an object .*; rows come as .*lines or an array"),
        ("g.json", b'[{"prompt": 1}, 5]', "a row must be an object"),
        ("g.json", b'[{"prompt": 1},\n {]', "line 2"),
        ("g.json", b'{\n  "data": []\n}', "line 1: no JSON row .*; rows come as .*lines or an array"),
        (
            "h.jsonl",
            json.dumps(GOOD_ROW).replace('"A"', '"\\ud800"').encode(),
            "completion.0.content: Input should be a valid string",
        ),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=message):
            check_file(tmp_path / name)
    pq.write_table(
        pa.Table.from_pylist([GOOD_ROW | {"tree_id": str(at)} for at in range(5_000)]), tmp_path / "i.parquet"
    )
    damaged = bytearray((tmp_path / "i.parquet").read_bytes())
    damaged[100:9_000] = b"\xff" * 8_900
    (tmp_path / "i.parquet").write_bytes(damaged)
    with pytest.raises(UsageError, match="is no Parquet file"):
        check_file(tmp_path / "i.parquet")
    with pytest.raises(UsageError, match="no file at"):
        check_file(tmp_path / "nowhere.jsonl")


def test_parquet_is_read_whatever_its_name(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([GOOD_ROW] * 2), tmp_path / "rows.txt")
    assert check_file(tmp_path / "rows.txt") == ("sft", 2)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.json.gz"])
@pytest.mark.parametrize("start", ["", "\n  ", "\ufeff"])
def test_the_content_says_whether_it_is_json_lines_or_an_array(tmp_path: Path, name: str, start: str) -> None:
    packed = gzip.compress if name.endswith(".gz") else bytes
    for text in ("\n".join(map(json.dumps, [GOOD_ROW] * 2)), json.dumps([GOOD_ROW] * 2, indent=2)):
        (tmp_path / name).write_bytes(packed((start + text).encode()))
        assert list(read_rows(tmp_path / name)) == [GOOD_ROW] * 2


def test_bytes_are_no_words(tmp_path: Path) -> None:
    said = [[{"role": role, "content": b"5"}] for role in ("user", "assistant")]
    pq.write_table(pa.table({"prompt": [said[0]], "completion": [said[1]]}), tmp_path / "bytes.parquet")
    with pytest.raises(UsageError, match=r"column prompt\.0\.content: Input should be a valid string"):
        check_file(tmp_path / "bytes.parquet")


def test_words_of_a_model_cannot_command_the_terminal(tmp_path: Path) -> None:
    hostile = "\x1b[2Ja\rb\x9bc\u202ed\x0ce\tf"
    shown = "\\x1b[2Ja\\rb\\x9bc\\u202ed\\x0ce\tf"
    row = {"prompt": GOOD_ROW["prompt"], "completion": [{"role": "assistant", "content": hostile}]}
    write_jsonl(tmp_path / "sft.jsonl", [row])
    assert f"loss │ {shown}<|im_end|>" in preview(tmp_path / "sft.jsonl", tiny_tokenizer(), 512).plain
    write_jsonl(tmp_path / "steps.jsonl", [STEPS | {"prompt": hostile, "completions": [hostile, "b"]}])
    assert preview(tmp_path / "steps.jsonl", tiny_tokenizer(), 512).plain.count(shown) == 2


def test_a_preview_shows_every_token_with_its_mark(folder: Path) -> None:
    text = preview(folder / "dpo" / "train.parquet", tiny_tokenizer(), 512, rows=1)
    lines = text.plain.splitlines()
    parts = dict.fromkeys(("prompt", "shared", "chosen", "rejected"), "")
    for line in lines:
        mark, _, shown = line.partition(" │ ")
        if mark.strip() in parts:
            parts[mark.strip()] += shown.replace("⏎", "\n")
    row = next(read_rows(folder / "dpo" / "train.parquet"))
    assert parts["prompt"] == f"<|im_start|>user\n{row['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert parts["shared"] + parts["chosen"] == row["chosen"][0]["content"] + "<|im_end|>"
    assert parts["shared"] + parts["rejected"] == row["rejected"][0]["content"] + "<|im_end|>"
    assert f"{row['prefix_tokens']} shared" in text.plain
    assert {str(span.style) for span in text.spans} >= {"dim", "cyan", "green", "red"}
    sft = preview(folder / "sft" / "train.parquet", tiny_tokenizer(), 60, rows=2).plain
    longest = [r["length_tokens"] for r in read_rows(folder / "sft" / "train.parquet")]
    assert "    loss │" in sft and "of at most 60: dropped" in sft
    dropped = int(re.search(r"(\d+) would be dropped", sft)[1])  # type: ignore[index]
    assert 0 < dropped <= len(longest)
    assert "   wrong │" in preview(folder / "stepwise" / "train.parquet", tiny_tokenizer(), 60, rows=9).plain
    with pytest.raises(UsageError, match="another tokenizer or chat template"):
        preview(folder / "sft" / "train.parquet", tiny_tokenizer(newline=False), 60)


def test_a_survey_counts_by_source_and_language_and_shows_the_worst(tmp_path: Path) -> None:
    loop = "I count the apples once more. " * 100
    rows = [
        {"response": "The answer is \\boxed{3}", "source": "a", "language": "en"},
        {"response": loop, "source": "a", "language": "en"},
        {"response": "3", "source": "b", "verdict": "no_answer"},
    ]
    write_jsonl(tmp_path / "samples.jsonl", rows)
    head, first, second, worst, other = diagnose_file(tmp_path / "samples.jsonl")
    assert "loop" in head
    assert first.split()[:3] == ["a", "en", "2"] and "1 ( 50.0%)" in first
    assert second.split()[:3] == ["b", "-", "1"] and "1 (100.0%)" in second
    assert worst.startswith("\nsamples, row 1: loop, instruction_failure, no_answer")
    assert other.startswith("\nsamples, row 2: instruction_failure, no_answer")
    pq.write_table(
        pa.Table.from_pylist([{"messages": [{"role": "assistant", "content": loop}]}]), tmp_path / "x.parquet"
    )
    assert "1 (100.0%)" in list(diagnose_file(tmp_path / "x.parquet"))[1]
    with pytest.raises(UsageError, match="row 0 has no text in thought; name its column"):
        list(diagnose_file(tmp_path / "samples.jsonl", field="thought"))
