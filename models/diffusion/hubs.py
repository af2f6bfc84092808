"""What is asked of the hubs, through their own libraries, and one sentence for each way in which it comes to nothing.

Both libraries keep what they have fetched in folders of their own: a file that is there whole is not fetched again, and
a download that was broken off is taken up where it stopped (the Hugging Face hub: within one call; after that, file by
file). Messages of theirs name folders of this machine and go on for lines, so none is passed on as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.errors import ModelFailed
from core.hearsay import hearsay

INDEX = "model_index.json"
ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
SAFE = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
FOREIGN = (".msgpack", ".h5", ".onnx", ".onnx_data", ".ot", ".gguf")  # weights that are not for diffusers
CONFIGURATION = ["*.json", "*.txt", "*.model", "*.jinja"]  # of a pipeline; the patterns match in all its folders
CHECKER = ("safety_checker", "feature_extractor")
HUGGING_FACE = "the Hugging Face hub"
UNREACHABLE = "the hub cannot be reached, or breaks off; check the network and try again (what has come is kept)"


def hugging_face(name: str, variant: str | None, options: Mapping[str, Any], one_network: bool = False) -> Path:
    """The folder of a pipeline (or of a ControlNet: `one_network`) from the Hugging Face hub, fetched as far as it is
    not in its cache. Raises `ModelFailed`."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    wanted = _wanted(options)
    try:
        if one_network:
            return Path(snapshot_download(name, allow_patterns=["config.json", f"diffusion_*{SAFE}"],
                                          ignore_patterns=["*.fp16*"], **wanted))
        safe = None if options.get("trust_pickle") else True
        return Path(DiffusionPipeline.download(name, variant=variant, use_safetensors=safe, **wanted))
    except Exception as fault:  # theirs are of many trees, some of libraries that only they know
        raise _refusal(name, fault, options) from None


def configuration(name: str, options: Mapping[str, Any]) -> Path:
    """A folder with a pipeline's configuration and vocabularies, without its weights. Raises `ModelFailed`."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=CONFIGURATION, **_wanted(options)))
    except Exception as fault:
        raise _refusal(name, fault, options) from None


def modelscope(name: str, options: Mapping[str, Any], environ: Mapping[str, str], one_network: bool = False) -> Path:
    """The same from ModelScope: what its cache holds whole, else what its library makes of it. Raises `ModelFailed`."""
    if not ID.fullmatch(name):
        raise ModelFailed(f"'{name[:100]}' is no ModelScope id; it has the form owner/name")
    optional = CHECKER if options.get("safety_checker") is False else ()
    partial = ""
    for folder in cached(name, options, environ):
        lacking = lacks(folder, one_network, optional)
        if not lacking:
            return folder
        partial = partial or f"is only partly in ModelScope's cache (missing: {lacking})"
    where = partial or "is not in ModelScope's cache"
    if options.get("offline"):
        raise ModelFailed(f"'{name}' {where}, and the option 'offline' is set")
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ModelFailed(f"'{name}' {where}, and to download it the package is missing: pip install modelscope"
                          ) from None
    unused = FOREIGN if options.get("trust_pickle") else (*FOREIGN, *PICKLES)
    try:
        return Path(snapshot_download(
            name, revision=options.get("revision") or None, ignore_patterns=[f"*{ending}" for ending in unused],
        ))
    except Exception as fault:
        raise ModelFailed(f"'{name}' cannot be had from ModelScope: {_why_not_scope(fault)}") from None


# --- what lies in ModelScope's cache ----------------------------------------------------------------------------------


def cached(name: str, options: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[Path]:
    """The folders of its cache in which a model may lie, newest layout first, as far as there is one.

    Since 1.38 the library writes `models/owner--name/snapshots/<revision>`. Before, it was `models/owner/name`, under
    `hub` where no variable named the cache, first without `models`; with dots in the name written as `___`.
    """
    base = Path(environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()
    snapshots = base / "models" / name.replace("/", "--") / "snapshots"
    wanted = str(options.get("revision") or "")
    there = sorted(folder.name for folder in snapshots.iterdir() if folder.is_dir()) if snapshots.is_dir() else []
    usual = [wanted] if wanted else ["master", "main", *(there if len(there) == 1 else ())]
    yield from (snapshots / revision for revision in dict.fromkeys(usual) if revision in there)
    owner, _, own = name.partition("/")
    for above in ("models", "hub/models", "hub", ""):
        for spelling in dict.fromkeys((own.replace(".", "___"), own)):
            folder = base / above / owner / spelling
            if (folder / INDEX).is_file() or (folder / "config.json").is_file():
                yield folder


def lacks(folder: Path, one_network: bool = False, optional: tuple[str, ...] = ()) -> str:
    """What a folder lacks of a pipeline, or of one network; "" when it is whole. Nothing is opened but the lists."""
    if one_network:
        return _lacks_weights(folder) if (folder / "config.json").is_file() else "config.json"
    try:
        index = json.loads((folder / INDEX).read_text("utf-8"))
    except (OSError, ValueError):
        return INDEX
    for part, entry in index.items():
        if not (isinstance(entry, list) and entry and entry[0]) or part.startswith("_") or part in optional:
            continue
        if not (folder / part).is_dir() or not any((folder / part).iterdir()):
            return str(part)
        if (folder / part / "config.json").is_file() and (file := _lacks_weights(folder / part)):
            return f"{part}/{file}"
    return ""


def _lacks_weights(folder: Path) -> str:
    """A shard that is listed and not there; or that there are no weights at all."""
    for listing in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(listing.read_text("utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            return listing.name
        gone = sorted(str(shard) for shard in shards if not (folder / str(shard)).is_file())
        if gone and listing.name.endswith(f"{SAFE}.index.json"):
            return gone[0]
    found = any(file.suffix in (SAFE, *PICKLES) for file in folder.iterdir())
    return "" if found else "weights"


# --- why not ----------------------------------------------------------------------------------------------------------


def _wanted(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"revision": options.get("revision") or None, "local_files_only": bool(options.get("offline"))}


def _refusal(name: str, fault: Exception, options: Mapping[str, Any]) -> ModelFailed:
    why = _why_not(fault, bool(options.get("offline")), str(options.get("revision") or "main"))
    return ModelFailed(f"'{name}' cannot be had from {HUGGING_FACE}: {why}")


def _why_not(fault: BaseException, offline: bool, revision: str) -> str:
    """The library wraps what happened in what it tried next, so the whole chain is looked at."""
    from huggingface_hub import errors

    chain = list(_chain(fault))

    def met(*kinds: type[BaseException]) -> Any:
        return next((one for one in chain if isinstance(one, kinds)), None)

    if offline:
        part = "only part of it is" if met(errors.IncompleteSnapshotError) else "it is not"
        return f"{part} in the cache, and the option 'offline' is set"
    if met(errors.OfflineModeIsEnabled):
        return "it is not in the cache, and the environment says HF_HUB_OFFLINE"
    if met(errors.GatedRepoError):
        return ("it is given only to who has accepted its terms; accept them on its page, then name a token in "
                "HF_TOKEN or run 'hf auth login'")
    if met(errors.RevisionNotFoundError):
        return f"it has no revision '{revision[:100]}'"
    if met(errors.RepositoryNotFoundError):
        return ("there is no model of that name, or it is private; check the name, or name a token that may read it in "
                "HF_TOKEN")
    if met(errors.RemoteEntryNotFoundError):
        return f"it has no {INDEX}; it is no diffusers pipeline"
    if (answered := met(errors.HfHubHTTPError)) is not None:
        status = answered.response.status_code
        if status in (401, 403):
            return f"the token is not taken (HTTP {status}); check HF_TOKEN"
        return f"the hub answers with HTTP {status}; try again later" if status >= 429 else f"HTTP {status}"
    if any(type(one).__module__.partition(".")[0] in ("httpx", "httpx2", "requests") for one in chain):
        return UNREACHABLE
    if "`safetensors` weights" in str(fault):
        return (f"it has no {SAFE} weights; if you know where its pickles come from, which can run code when they are "
                "loaded, set the model's option 'trust_pickle'")
    return hearsay(fault)


def _why_not_scope(fault: BaseException) -> str:
    chain = list(_chain(fault))
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    status = next((code for one in chain if (code := getattr(getattr(one, "response", None), "status_code", None))), 0)
    if "NotExistError" in names or status == 404:
        return "there is no model of that name or no such revision; check them"
    if names & {"AuthenticationError", "PermissionDeniedError"} or status in (401, 403):
        return "it is private, or its terms are to be accepted; name a token in MODELSCOPE_API_TOKEN"
    if names & {"ConnectionError", "Timeout", "NetworkError", "FileDownloadError"} or status >= 500:
        return UNREACHABLE
    return hearsay(fault)


def _chain(fault: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    one: BaseException | None = fault
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__
