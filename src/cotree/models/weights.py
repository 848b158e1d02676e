"""Locate model weights by name: packaged models, files, transformers folders, hub models.

Packaged files are checked against their SHA-256. Local files take precedence over the hub.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from math import prod
from pathlib import Path

import yaml

from cotree.base.atomic import atomic_draft
from cotree.base.errors import UsageError
from cotree.base.settings import Section
from cotree.models.checksums import MODEL_FILES, OTHER_DISK, cache_folder, check_weights, file_sha256


class PackagedModel(Section):
    """A model whose GGUF file comes in Python packages.

    file: file name. parts: (package, path in it), concatenated. install: requirement to install. about: description.
    hub: a hub repository with the same file, used if the packages are not installed.
    """

    file: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    install: str
    about: str
    hub: str | None = None


_SHIPPED = yaml.safe_load((files("cotree.models") / "packaged.yaml").read_text("utf-8"))
PACKAGED = {name: PackagedModel.model_validate(model) for name, model in _SHIPPED.items()}

# A hub model: `OWNER/NAME`, `OWNER/NAME@REVISION`, or a GGUF file (`OWNER/NAME:FILE.gguf`,
# `OWNER/NAME@REVISION:FILE.gguf`).
HUB_WEIGHTS = re.compile(
    r"(?![^:]*\.gguf$)(?P<repo>\w[\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<file>.+\.gguf))?"
)
FORMS = (
    f"a packaged model ({', '.join(PACKAGED)}), a .gguf file, a transformers folder, or a model of the hub "
    "(OWNER/NAME, OWNER/NAME@REVISION, OWNER/NAME:FILE.gguf)"
)


def locate(name: str) -> Path:
    """The GGUF file or transformers folder of a packaged model, a path, or a hub model (`HUB_WEIGHTS`).

    Parts of a packaged file are joined once in the cache folder; hub models are downloaded once to the hub client's
    cache. Local files take precedence.

    Raises:
        UsageError: not found locally or on the hub, damaged, or incomplete.
        CotreeError: the cache folder cannot be written.
    """
    if name in PACKAGED:
        return _packaged_file(name, PACKAGED[name])
    path = Path(name)
    if path.is_dir():
        return _whole_folder(path, name)
    if name.endswith(".gguf") and path.is_file():
        return path
    if (on_hub := HUB_WEIGHTS.fullmatch(name)) and not path.exists():
        repo, revision, file = on_hub["repo"], on_hub["revision"], on_hub["file"]
        return _hub_file(repo, file, revision) if file else _whole_folder(_hub_folder(repo, revision), name)
    raise UsageError(f"no weights `{name}` are here; {did_you_mean(name)}give {FORMS}")


def did_you_mean(name: str) -> str:
    """A hint with the most similar packaged model's name, for an error message."""
    near = difflib.get_close_matches(name, PACKAGED, n=1)
    return f"did you mean `{near[0]}`? Else " if near else ""


def _whole_folder(path: Path, name: str) -> Path:
    """Check that a transformers folder has a config, all weight files and a tokenizer, and return it; `name` is for
    errors."""
    from cotree.models.gguf_files import weight_files
    from cotree.models.tokenizer import check_has_tokenizer

    if (path / "config.json").is_file() and (files := weight_files(path)):
        if missing := [file.name for file in files if not file.is_file()]:
            raise UsageError(f"{name} lacks {missing[0]} ({len(missing)} of {len(files)} files); copy it again")
        check_has_tokenizer(path)
        return path
    check_weights(path)
    fix = f"give {path / 'model'}" if (path / "model").is_dir() else "give a transformers folder"
    raise UsageError(f"{name} has no config.json with model.safetensors or model.safetensors.index.json; {fix}")


def packaged_models() -> str:
    """List the packaged models: name, description, whether installed. Offline."""
    lines, width = [], max(map(len, PACKAGED))
    for name, model in PACKAGED.items():
        here = _installed_parts(model) or _in_hub_cache(model) or (cache_folder() / model.file).is_file()
        lines.append(f"{name:{width}}  {model.about}{'' if here else f'; not installed: {model.install}'}")
    return "\n".join(lines)


def context_length(source: Path) -> int | None:
    """The maximum context length recorded in a GGUF file or transformers folder, or None."""
    from cotree.models.gguf_files import GGUF

    if source.is_dir():
        found = json.loads((source / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    else:
        file = GGUF(source)
        found = file.get(f"{file['general.architecture']}.context_length")
    return found if isinstance(found, int) else None


def parameter_count(source: Path) -> int:
    """The number of parameters in a GGUF file or a transformers folder."""
    from cotree.models.gguf_files import GGUF, stored_tensors

    tensors = stored_tensors(source) if source.is_dir() else GGUF(source).tensors
    return sum(prod(tensor.shape) for tensor in tensors.values())


def _packaged_file(name: str, model: PackagedModel) -> Path:
    joined = cache_folder() / model.file
    if len(model.parts) > 1 and joined.is_file() and file_sha256(joined) == model.sha256:
        return joined
    parts = _installed_parts(model)
    if not parts:
        return _file_from_hub(name, model)
    if len(parts) == 1:
        return _undamaged(parts[0], model)
    with atomic_draft(joined, OTHER_DISK) as draft:
        with draft.open("wb") as joining:
            for part in filter(Path.is_file, parts):
                joining.write(part.read_bytes())
        _undamaged(draft, model)
    return joined


def _installed_parts(model: PackagedModel) -> list[Path]:
    """The paths of a packaged model's parts; empty if a package is missing."""
    parts = []
    for package, file in model.parts:
        # Never import the package: its imports may need compiled dependencies that cotree does not use.
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            return []
        parts.append(Path(spec.origin).parent / file)
    return parts


def _file_from_hub(name: str, model: PackagedModel) -> Path:
    """Download a packaged model's file from the hub, or take it from the hub client's cache."""
    if model.hub is None:
        raise UsageError(f"model `{name}` is not installed; run {model.install}")
    try:
        path = _in_hub_cache(model) or _hub_file(model.hub, model.file)
    except UsageError as error:
        fault = f"model `{name}` is not installed and cannot be fetched from the hub"
        raise UsageError(f"{fault}; run {model.install}") from error
    if file_sha256(path) != model.sha256:
        fault = f"{model.file} of {model.hub} is damaged (its sha256 is not {model.sha256[:12]}...)"
        raise UsageError(f"{fault}; delete {path.resolve()} or run {model.install}")
    return path


def _in_hub_cache(model: PackagedModel) -> Path | None:
    """A packaged model's file in the hub client's cache, or None. Offline."""
    if model.hub is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.hub, model.file)
    return Path(found) if isinstance(found, str) else None


def _undamaged(path: Path, model: PackagedModel) -> Path:
    """Check a file's SHA-256 and return its path."""
    if not path.is_file() or file_sha256(path) != model.sha256:
        packages = ", ".join(package.replace("_", "-") for package, _ in model.parts)
        raise UsageError(f"{model.file} is damaged (its sha256 is not {model.sha256[:12]}...); reinstall {packages}")
    return path


def _hub_file(repo: str, file: str, revision: str | None = None) -> Path:
    from huggingface_hub import hf_hub_download

    with _hub_errors(f"{file} of {repo}"):
        return Path(hf_hub_download(repo, file, revision=revision))


def _hub_folder(repo: str, revision: str | None) -> Path:
    """Download a hub model's transformers files to the hub client's cache."""
    from huggingface_hub import snapshot_download

    wanted = [*MODEL_FILES, "model.safetensors.index.json", "generation_config.json"]
    with _hub_errors(repo):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the hub client raises a dozen unrelated types
        from huggingface_hub import is_offline_mode
        from huggingface_hub.errors import RepositoryNotFoundError

        if is_offline_mode():
            raise UsageError(f"{what} is not here, and the hub is not asked now (offline)") from None
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = next(filter(None, str(error).splitlines()), type(error).__name__)
        if isinstance(error, RepositoryNotFoundError) and status == 404:
            reason = "there is no such model; correct the name"
        elif status in (401, 403):
            reason = "access is refused; accept its licence on its page there, then run `hf auth login`"
        elif "ConnectError" in reason or "ConnectTimeout" in reason:
            reason = "it is not reached; check the network"
        raise UsageError(f"{what} is not here, and cannot be got from the hub: {reason}, or give a path") from None
