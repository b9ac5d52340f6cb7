"""Uploads a directory to a repository of the Hub. The token comes from HF_TOKEN or the saved login alone."""

from __future__ import annotations

import shlex
from pathlib import Path

from dreamprm_jax.errors import InputError
from dreamprm_jax.models.hub import told

RECORD = "export.json"  # stays here: it names paths of this machine
_OWN = ("*.safetensors", "*.safetensors.index.json", "weights.*")  # of an earlier upload, under names that may differ


def check_token() -> None:
    """Checks, before any work, that there is a token.

    Raises:
      InputError: there is none.
    """
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise InputError(
            "--config.export.repo: no token for the Hub; set HF_TOKEN in the environment or run `hf auth login`"
        )


def upload(directory: Path, repo: str, message: str, *, private: bool) -> dict[str, str]:
    """Uploads an export in one commit, and removes an earlier export's weights from the repository.

    Args:
      directory: the export.
      repo: "org/name"; made where there is none.
      message: of the commit.
      private: only a private repository will do.

    Returns:
      repo, commit (its hash) and url.

    Raises:
      InputError: the Hub or the network refuses, or the repository is public where it should not be.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        is_public = private and not api.model_info(repo).private
        if not is_public:
            done = api.upload_folder(
                repo_id=repo,
                folder_path=str(directory),
                commit_message=message,
                ignore_patterns=[RECORD],
                delete_patterns=list(_OWN),
            )
    except Exception as error:  # the client raises errors of several libraries
        again = f"hf upload {repo} {shlex.quote(str(directory))} . --exclude {RECORD}{' --private' if private else ''}"
        raise InputError(
            f"--config.export.repo={repo}: not uploaded ({told(error)}); the export is whole in {directory}, and "
            f"`{again}` uploads it again"
        ) from error
    if is_public:
        raise InputError(
            f"--config.export.repo={repo}: is public, and was left as it is; --config.export.private=False uploads to "
            f"it all the same. The export is whole in {directory}"
        )
    return {"repo": repo, "commit": done.oid, "url": done.commit_url}
