"""A viewer of a run on a free port of loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from cotree.base.run_folder import RunFolder
from cotree.experiment.recipe import load_recipe
from cotree.experiment.run import nodes_of
from cotree.view.server import Viewer


@asynccontextmanager
async def viewer(run: RunFolder, **options: Any) -> AsyncIterator[str]:
    """Its address, with a slash at the end."""
    nodes = nodes_of(load_recipe(run.path / "recipe.yaml"))
    runner = web.AppRunner(Viewer(run, nodes, **options).app(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()
