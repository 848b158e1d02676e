"""A finished run of a small experiment, which tests copy: made once, as its four students take seconds each."""

from __future__ import annotations

import copy
import gc
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_server import ASSISTANT, FakeServerThread

# A written recipe, and the folder of its finished runs.
Done = tuple[dict[str, Any], Path]


@pytest.fixture(scope="session")
def server() -> Iterator[FakeServerThread]:
    from tests.support.knowing import knowing_reply

    with FakeServerThread(chat_only=True, reply=knowing_reply) as found:
        yield found


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer whose tokens are the fake server's: words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template, unk_token="<unk>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama as a GGUF. From here on training is fast: one thread, and no garbage is looked for in imports."""
    import torch
    from tests.support.experiment import tiny_student

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    return tiny_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def finished(server: FakeServerThread, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A written recipe and the folder of its finished run."""
    from tests.support.experiment import begun, small

    runs, written = tmp_path_factory.mktemp("finished"), small(server.url, student)
    first = begun(written, runs)
    assert first[0] == "trees/train" and len(first) == 1 + 4 + 4 + 3
    return written, runs


@pytest.fixture
def done(finished: Done, tmp_path: Path) -> Done:
    """The finished run for one test alone, at `tmp_path/runs/steps`."""
    written, runs = finished
    shutil.copytree(runs, tmp_path / "runs")
    return copy.deepcopy(written), tmp_path / "runs"


@pytest.fixture
def hold() -> Iterator[Callable[[Path], Callable[[], None]]]:
    """Let another process work in a run folder; a call of what it gives kills that process with -9."""
    processes = []

    def start(folder: Path) -> Callable[[], None]:
        code = "import sys, time; from pathlib import Path; from cotree.base.lock import locked\n"
        code += "with locked(Path(sys.argv[1])):\n    print('works', flush=True); time.sleep(600)"
        process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "works\n"

        def release() -> None:
            process.send_signal(signal.SIGKILL)
            process.wait()

        return release

    yield start
    for process in processes:
        process.kill()
        process.communicate()
