"""Uploads of exports to the Hub: private, one commit, the token in no file and no message. No network: a stand-in."""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
from exporting import checkpoint, export_config  # noqa: F401 - a fixture

from dreamprm_jax.errors import InputError
from dreamprm_jax.export import run_export

TOKEN = "hf_secretsecretsecret"
COMMIT = "https://huggingface.co/org/name/commit/abc123"


@pytest.fixture
def api(monkeypatch):
    """A stand-in that knows the client's methods and their arguments; the repository is private."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    found = mock.create_autospec(huggingface_hub.HfApi, instance=True)
    found.model_info.return_value.private = True
    found.upload_folder.return_value = huggingface_hub.CommitInfo(COMMIT, "message", "", "abc123")
    maker = mock.Mock(return_value=found)
    monkeypatch.setattr(huggingface_hub, "HfApi", maker)
    yield found
    assert all(not call.args and not call.kwargs for call in maker.call_args_list), "the token is the client's business"


def refusal(cfg, directory):
    with pytest.raises(InputError) as error:
        run_export(cfg, directory)
    assert "\n" not in str(error.value) and TOKEN not in str(error.value)
    return str(error.value)


def test_an_export_is_uploaded_in_one_commit_and_recorded(api, checkpoint, tmp_path, capsys):
    directory = tmp_path / "export"
    report = run_export(export_config(checkpoint, repo="org/name"), directory)
    assert report["hub"] == {"repo": "org/name", "commit": "abc123", "url": COMMIT}
    api.create_repo.assert_called_once_with("org/name", private=True, exist_ok=True)
    (call,) = api.upload_folder.call_args_list
    assert (call.kwargs["repo_id"], call.kwargs["folder_path"]) == ("org/name", str(directory))
    assert call.kwargs["commit_message"] == "tiny: hf layout, bfloat16"
    assert call.kwargs["ignore_patterns"] == ["export.json"]
    assert "*.safetensors" in call.kwargs["delete_patterns"]
    record = json.loads((directory / "export.json").read_text())
    assert record["hub"] == report["hub"] and "README.md" in record["files"]
    told = "".join(capsys.readouterr())
    assert TOKEN not in told
    assert all(TOKEN.encode() not in path.read_bytes() for path in directory.iterdir())
    run_export(export_config(checkpoint), directory)  # it is still an export that may be replaced


def test_a_failed_upload_leaves_the_export_and_says_how_to_go_on(api, checkpoint, tmp_path):
    api.upload_folder.side_effect = ConnectionError(f"no route for {TOKEN}\nand more")
    directory = tmp_path / "an export"
    message = refusal(export_config(checkpoint, repo="org/name"), directory)
    assert "not uploaded (ConnectionError: no route for [token])" in message
    assert f"`hf upload org/name '{directory}' . --exclude export.json --private`" in message
    assert "hub" not in json.loads((directory / "export.json").read_text())
    api.upload_folder.side_effect = None
    run_export(export_config(checkpoint, repo="org/name"), directory)


def test_a_public_repository_is_not_uploaded_to_by_default(api, checkpoint, tmp_path):
    api.model_info.return_value.private = False
    message = refusal(export_config(checkpoint, repo="org/name"), tmp_path / "export")
    assert "is public" in message and "--config.export.private=False" in message
    api.upload_folder.assert_not_called()
    assert (tmp_path / "export/export.json").is_file()
    run_export(export_config(checkpoint, repo="org/name", private=False), tmp_path / "export")
    assert api.create_repo.call_args.kwargs["private"] is False
    api.upload_folder.assert_called_once()


def test_without_a_token_nothing_is_begun(api, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    message = refusal(export_config(checkpoint, repo="org/name"), tmp_path / "export")
    assert "HF_TOKEN" in message and "hf auth login" in message
    assert not (tmp_path / "export").exists()


def test_without_a_repository_the_hub_is_left_alone(api, checkpoint, tmp_path):
    assert "hub" not in run_export(export_config(checkpoint), tmp_path / "export")
    assert not api.method_calls


def test_the_command_that_uploads_again_is_one_of_the_client():
    """`hf upload` still has the options that the message names."""
    client = Path(sys.executable).with_name("hf")
    told = subprocess.run([client, "upload", "--help"], capture_output=True, text=True, timeout=120).stdout
    assert "--exclude" in told and "--private" in told and "LOCAL_PATH" in told
