"""What is committed as the viewer's page is what `make web` builds from web/."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WEB, STATIC = ROOT / "web", ROOT / "src/cotree/view/static"


def test_the_bundle_is_that_of_the_sources() -> None:
    """Both scripts begin with the hash that web/build.mjs takes of web/; `make web` brings them up to date."""
    found = hashlib.sha256()
    files = [path for path in WEB.rglob("*") if path.is_file() and "node_modules" not in path.parts]
    for name, path in sorted((path.relative_to(WEB).as_posix(), path) for path in files):
        found.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    for script in ("app.js", "report.js"):
        assert (STATIC / script).read_text(encoding="utf-8").startswith(f"/* web {found.hexdigest()} */")


def test_the_page_needs_no_file_but_its_own() -> None:
    for name in ("index.html", "app.css"):
        text = (STATIC / name).read_text(encoding="utf-8")
        linked = re.findall(r'(?:src|href)="([^"]*)"', text) + re.findall(r"url\(\"?([^\")]*)", text)
        own = [link.removeprefix("/static/").removeprefix("./") for link in linked if not link.startswith("data:")]
        assert own and all((STATIC / link).is_file() for link in own), own
    assert "url(" not in (STATIC / "report.css").read_text(encoding="utf-8")


def test_the_lockfile_names_no_registry_but_the_public_one() -> None:
    packages = json.loads((WEB / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    assert len(packages) > 2
    for name, package in packages.items():
        assert not name or package["integrity"].startswith("sha512-"), name
        assert package.get("resolved", "https://registry.npmjs.org/").startswith("https://registry.npmjs.org/"), name
