"""The hub: one part of a repository, in diffusers' layout, fetched into the hub's cache.

    download("THUDM/CogVideoX1.5-5B", "vae")                      -> the repository's folder in the cache
    download("nvidia/difix@main", None, "model_index.json")       # of a branch, a tag or a commit

Wherever an id is taken, it may end in @REVISION. Without `cache_dir` and `token` the hub's own settings apply: HF_HOME,
HF_TOKEN, HF_HUB_OFFLINE, and what `hf auth login` has stored. A system is read in several parts, perhaps of several
repositories: `reads_hub` gives its from_pretrained the three arguments, and hands two of them on by a context.

    python -m mirage_min.networks.hub            # which files of a repository are asked for
"""

import functools
import re
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path

CONFIG, WEIGHTS, INDEX = "config.json", "diffusion_pytorch_model.safetensors", "*.safetensors.index.json"
PROMPT = "prompt.safetensors"  # a system's, next to its model_index.json
access: ContextVar[dict] = ContextVar("access", default={})  # cache_dir and token of the system that is being read


def is_id(text: str) -> bool:
    """Whether a text has the form of a hub id: org/name, or org/name@revision."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text))


def split(text: str) -> tuple[str, str | None]:
    """"org/name@revision" -> (org/name, revision); without one it is None."""
    name, _, revision = text.partition("@")
    return name, revision or None


def pinned(path: str | Path, revision: str | None) -> str | Path:
    """An id with the revision that it is to be read at; a folder, or without a revision, the path as it is.

    ValueError if the id names another revision.
    """
    if revision is None or Path(path).expanduser().is_dir() or not is_id(str(path)):
        return path
    name, said = split(str(path))
    if said and said != revision:
        raise ValueError(f"{path}: names a revision, and another is given: {revision}")
    return f"{name}@{revision}"


def reads_hub(load: Callable) -> Callable:
    """A system's from_pretrained(cls, path, ...) with three more arguments, as diffusers has them.

    revision    a branch, a tag or a commit of the repository `path`; other repositories are read at their own
    cache_dir   where all parts are looked for and kept
    token       with which all parts are fetched
    """
    @functools.wraps(load)
    def from_pretrained(cls, path: str | Path, *args, revision: str | None = None,
                        cache_dir: str | Path | None = None, token: str | bool | None = None, **options):
        before = access.set({"cache_dir": cache_dir, "token": token})
        try:
            return load(cls, pinned(path, revision), *args, **options)
        finally:
            access.reset(before)
    return from_pretrained


def patterns(subfolder: str | None, config: str = CONFIG) -> list[str]:
    """What is fetched: config and weights of a repository, or of one of its subfolders.

    A star also matches "/", so every pattern starts with the folder and the usual stem; shards are matched to their
    last digit, so that fp16 copies of the same weights are not fetched.
    """
    start = f"{subfolder}/" if subfolder else ""
    stem = WEIGHTS.removesuffix(".safetensors")
    names = [config, WEIGHTS, f"{stem}-*-of-?????.safetensors", f"{stem}{INDEX[1:]}"]
    names += [] if subfolder else [PROMPT]
    return [start + name for name in names]


def download(repo: str, subfolder: str | None, config: str = CONFIG, revision: str | None = None,
             cache_dir: str | Path | None = None, token: str | bool | None = None) -> Path:
    """Fetch `patterns` of a hub repository into the cache -> its folder there.

    revision   a branch, a tag or a commit; None: the one that the id ends in, else main
    cache_dir  and token; None: those of the system that is being read, else the hub's own
    ValueError if two revisions are given, or the hub does not have it or cannot be reached.
    """
    from huggingface_hub import snapshot_download  # imported here: local folders do not need it
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    name, at = split(str(pinned(repo, revision)))
    cache_dir = access.get().get("cache_dir") if cache_dir is None else cache_dir
    token = access.get().get("token") if token is None else token
    try:
        return Path(snapshot_download(name, revision=at, cache_dir=cache_dir, token=token,
                                      allow_patterns=patterns(subfolder, config)))
    except RepositoryNotFoundError as error:
        raise ValueError(f"{repo}: neither a folder here nor a model on the hub, or a private or gated one "
                         "(then: hf auth login)") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo}: the hub has no revision {at} of it") from error
    except Exception as error:  # the network has many ways to fail, and every version of the hub its own classes
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{repo}: no such folder here, not whole in the hub's cache, and the hub could not be asked "
                         f"(offline?): {reason}") from error


if __name__ == "__main__":
    print(split("THUDM/CogVideoX1.5-5B@main"))
    for pattern in patterns("vae"):
        print(pattern)
