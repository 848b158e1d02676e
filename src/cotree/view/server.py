"""`cotree view`: a local web server for the viewer's page and its JSON data.

Invariant: Host and Origin are checked against DNS rebinding, and a token is required beyond loopback. A content
security policy allows the page's own script only, and no other host. Runs are read in a separate thread, so that a
large tree blocks no connection.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import webbrowser
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cotree.base.errors import CotreeError, NotFoundError, UsageError
from cotree.base.progress import Output
from cotree.base.run_folder import RunFolder
from cotree.base.serving import LOOPBACK, TOKEN, is_foreign, is_same_secret, listen
from cotree.data.annotations import FILE, Annotations, ConflictError, agreement, annotate
from cotree.report.summary import NodeReads
from cotree.search.index import TreeQuery
from cotree.view.results import Changed, about_run, curves, replies, tables
from cotree.view.trees import TreesOfRun

_STATIC = Path(__file__).parent / "static"
_COOKIE = "cotree_token"
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_MOST_ROWS = 1_000
_Number = Annotated[int, Field(ge=0, lt=2**63)]  # fits an SQLite integer
_TOTALS = {"questions": "trees", "thoughts": "thoughts"}


class _Parameters(BaseModel):
    """Validated parameters of a request; unknown ones are errors."""

    model_config = ConfigDict(extra="forbid")


class _Page(_Parameters):
    """Parameters of a page of the list of trees."""

    offset: _Number = 0
    limit: _Number = 100
    q: str = ""
    desc: bool = False
    sort: str = "question"
    task: str | None = None
    verdicts: str | None = None
    min_depth: _Number = 0
    reflected: str | None = None
    forced: bool = False
    looped: bool = False
    annotated: bool | None = None

    def query(self) -> TreeQuery:
        given = self.model_dump(exclude={"offset", "limit", "q", "desc"})
        return _QUERY.validate_python({**given, "words": self.q, "descending": self.desc})


class _Chain(_Parameters):
    """A chain, its annotator, and the version of the last annotation that the browser showed."""

    node: str
    tree: str
    leaf: int
    annotator: str
    seen: int | None = None


class _Saved(_Chain):
    """An annotation to save."""

    verdict: str
    note: str = ""
    text: str = ""


class _Replies(_Parameters):
    """Parameters of a page of replies."""

    evaluation: str
    model: str
    beside: str | None = None
    show: Changed = "all"
    offset: _Number = 0
    limit: _Number = 50


_QUERY = TypeAdapter(TreeQuery)


class Viewer:
    """HTTP request handlers for one run.

    nodes: of its experiment, in order with their dependencies (`report.summary.summarize_run`).
    annotator: the annotator's name; None: the page asks. read_only: refuse annotations. token: required of clients;
    None on loopback.
    """

    def __init__(
        self,
        run: RunFolder,
        nodes: Sequence[NodeReads],
        *,
        host: str = "127.0.0.1",
        read_only: bool = False,
        annotator: str | None = None,
    ) -> None:
        self.nodes = nodes
        self.run, self.host, self.read_only, self.annotator = run, host, read_only, annotator
        self.token = os.environ.get(TOKEN) or (None if host in LOOPBACK else secrets.token_urlsafe(16))
        self.trees = TreesOfRun(run)
        self._thread = ThreadPoolExecutor(1, "cotree-view")

    def app(self) -> web.Application:
        """The web application."""
        app = web.Application(middlewares=[self._answer_in_json])
        routes: dict[str, Callable[[web.Request], Any]] = {
            "/api/run": self._about,
            "/api/trees/{node:[^/]+}": self._list,
            "/api/trees/{node:[^/]+}/{tree:[^/]+}": self._tree,
            "/api/annotations": self._annotations,
            "/api/students": lambda _: curves(self.run),
            "/api/tables": lambda _: tables(self.run, self.nodes),
            "/api/replies": self._replies,
            "/api/version": lambda request: {"changes": self.trees.changes(request.query.get("node", ""))},
        }
        for path, read in routes.items():
            app.router.add_get(path, partial(self._read, read))
        app.router.add_post("/api/annotations", partial(self._change, _Saved))
        app.router.add_delete("/api/annotations", partial(self._change, _Chain))
        app.router.add_get("/", self._page)
        app.router.add_static("/static", _STATIC)
        app.on_response_prepare.append(self._add_headers)
        app.cleanup_ctx.append(self._closing)
        return app

    async def _closing(self, _: web.Application) -> AsyncIterator[None]:
        yield
        await self._in_thread(self.trees.__exit__)
        self._thread.shutdown()

    async def _in_thread(self, function: Callable[..., Any], *values: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *values)

    async def _add_headers(self, _: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(_HEADERS)

    @web.middleware
    async def _answer_in_json(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Middleware: check the sender, and convert all errors to one line of JSON."""
        try:
            if refused := self._refusal(request):
                return refused
            return await handler(request)
        except ConflictError as error:
            found = None if error.found is None else error.found.shown
            return web.json_response({"error": str(error), "annotation": found}, status=409)
        except NotFoundError as error:
            return _error(404, str(error))
        except (UsageError, ValidationError, UnicodeError) as error:
            return _error(400, _first_fault(error))
        except CotreeError as error:
            return _error(500, str(error))
        except web.HTTPException as error:
            return error if error.status < 400 else _error(error.status, error.reason)

    def _refusal(self, request: web.Request) -> web.Response | None:
        """Refuse an unknown Host, a foreign Origin, or a missing token."""
        if is_foreign(self.host, request.host, request.headers.get("Origin")):
            return _error(403, f"this server answers to {self.host} by no other name, and to no other server's pages")
        if self.token is None or is_same_secret(request.cookies.get(_COOKIE, ""), self.token):
            return None
        if not is_same_secret(request.query.get("token", ""), self.token):
            return _error(403, "open the address with its token, as `cotree view` printed it")
        known = web.Response(status=303, headers={"Location": request.path})
        known.set_cookie(_COOKIE, self.token, httponly=True, samesite="Strict")
        return known

    async def _page(self, _: web.Request) -> web.FileResponse:
        return web.FileResponse(_STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    async def _read(self, read: Callable[[web.Request], Any], request: web.Request) -> web.Response:
        text = await self._in_thread(_as_json, read, request)
        return web.Response(body=text, content_type="application/json", headers={"Cache-Control": "no-store"})

    def _about(self, _: web.Request) -> dict[str, Any]:
        totals = {name: self.trees.totals(name).values() for name in self.trees.names()}
        trees = [
            {"node": name} | {key: sum(each[of] for each in found) for key, of in _TOTALS.items()}
            for name, found in totals.items()
        ]
        return {
            **about_run(self.run, self.nodes),
            "trees": trees,
            "read_only": self.read_only,
            "annotator": self.annotator,
        }

    def _list(self, request: web.Request) -> dict[str, Any]:
        page = _Page.model_validate(dict(request.query))
        limit = min(page.limit, _MOST_ROWS)
        return self.trees.page(request.match_info["node"], page.query(), page.offset, limit)

    def _tree(self, request: web.Request) -> dict[str, Any]:
        return self.trees.tree(request.match_info["node"], request.match_info["tree"])

    def _replies(self, request: web.Request) -> dict[str, Any]:
        asked = _Replies.model_validate(dict(request.query))
        page = {"offset": asked.offset, "limit": min(asked.limit, _MOST_ROWS)}
        return replies(self.run, asked.evaluation, asked.model, beside=asked.beside, show=asked.show, **page)

    def _annotations(self, request: web.Request) -> dict[str, Any]:
        annotations = self.trees.annotations()
        found = [] if annotations is None else annotations.all(node=request.query.get("node"))
        rows = [{"node": each.node, "tree": each.tree, **each.shown} for each in found]
        return {"rows": rows, "agreement": agreement(found)}

    async def _change(self, kind: type[_Chain], request: web.Request) -> web.Response:
        """Save or withdraw an annotation."""
        if self.read_only:
            return _error(403, "this is read only: `cotree view` without --read-only takes annotations")
        if request.content_type != "application/json":
            return _error(400, "send JSON, as content type application/json")
        asked = kind.model_validate_json(await request.read())
        return web.json_response({"version": await self._in_thread(self._save, asked)})

    def _save(self, asked: _Chain) -> int:
        said = asked.model_dump(include={"annotator", "verdict", "note", "text"})
        tree = self.trees.open(asked.node).store.tree(asked.tree)
        new = annotate(tree, asked.leaf, asked.node, **{"verdict": None, **said})
        with Annotations(self.run.path / FILE) as annotations:
            return annotations.save(new, asked.seen)


def _as_json(read: Callable[[web.Request], Any], request: web.Request) -> bytes:
    # Lone surrogates in model output stay escaped.
    return json.dumps(read(request), ensure_ascii=True, separators=(",", ":")).encode()


def _error(status: int, words: str) -> web.Response:
    return web.json_response({"error": " ".join(words.split())}, status=status)


def _first_fault(error: Exception) -> str:
    """One line about an invalid request."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))


def view(
    run: RunFolder,
    nodes: Sequence[NodeReads],
    *,
    host: str,
    port: int,
    browser: bool = True,
    output: Output | None = None,
    **options: Any,
) -> None:
    """Serve a run's viewer until Ctrl-C; prints the address when it listens.

    Args:
        port: 0 for a free one. browser: open the page in a browser. nodes, options: those of `Viewer`.

    Raises:
        UsageError: the address cannot be bound, or the run's trees cannot be read.
    """
    viewer, output = Viewer(run, nodes, host=host, **options), output or Output()
    listening, address = listen(host, port)
    page = f"{address}/" + (f"?token={viewer.token}" if viewer.token else "")

    def show(_: str) -> None:
        output.print(f"{run.path} at {page} (Ctrl-C ends it)")
        if browser:
            webbrowser.open(page)

    web.run_app(viewer.app(), sock=listening, access_log=None, shutdown_timeout=1.0, print=show)
    output.print("closed")
