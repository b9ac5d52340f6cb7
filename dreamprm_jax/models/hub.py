"""A checkpoint's directory: a local one, or what the Hub gives, at one commit and nothing but safetensors and JSON."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path

from dreamprm_jax.errors import InputError, printable

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[^@]+))?")


def checkpoint_directory(source: str | Path, files: tuple[str, ...] = ("*.json", "*.safetensors")) -> Path:
    """A local directory as it is, or that of a Hub id after a download of its `files`.

    Raises:
      InputError: neither, or the Hub did not give it.
    """
    if Path(source).is_dir():
        return Path(source)
    hub_id = HUB_ID.fullmatch(str(source))
    if Path(source).exists() or hub_id is None:
        raise InputError(f"{source}: not a directory, and not a Hub id (org/name or org/name@revision)")
    return _download(hub_id["repo"], hub_id["revision"], files)


@functools.cache
def _download(repo: str, revision: str | None, files: tuple[str, ...]) -> Path:
    """One commit of a repository, for the whole process the same: a branch may move between two downloads.

    The client asks for the commit of the revision first, takes every file from that, and names the directory by it.
    """
    import huggingface_hub  # here, because a machine that only trains need not have it

    name = repo if revision is None else f"{repo}@{revision}"
    wanted = {"revision": revision, "allow_patterns": list(files)}
    try:
        directory = Path(huggingface_hub.snapshot_download(repo, **wanted))
    except Exception as error:  # the client raises errors of several libraries
        reason = told(error)
    else:
        pin = "" if revision == directory.name else f"; {repo}@{directory.name} asks for this one again"
        print(printable(f"{name}: commit {directory.name}{pin}"), file=sys.stderr)
        return directory
    # Outside the handler: the client's own error holds the request, and its headers the token.
    raise InputError(
        f"{name}: no such directory, and the Hub did not give it ({reason}); check the name and the network, or "
        "download the checkpoint elsewhere and give its directory"
    )


def told(error: Exception) -> str:
    """What the client's error says, in one line and without the token."""
    import huggingface_hub

    text, token = (str(error).strip() or "no reason given").splitlines()[0], huggingface_hub.get_token()
    return f"{type(error).__name__}: {text.replace(token, '[token]') if token else text}"
