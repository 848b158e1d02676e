"""The engine in this process: it ends when it is told to, at any moment."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest


@pytest.mark.real
@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.2, 0.3, 0.5, 0.8])
def test_ctrl_c_while_the_engine_starts_ends_the_process(seconds: float) -> None:
    script = (
        "import time, xllamacpp; from cotree.models.llama_cpp import serve\n"
        "from cotree.models.resolve import gguf_at_type\n"
        "from cotree.models.weights import locate\n"
        "path = gguf_at_type(locate('smollm2-135m-instruct'), 'Q8_0'); print('starting', flush=True)\n"
        "with serve(path): time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"starting\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=30) != 0
        finally:
            process.kill()
