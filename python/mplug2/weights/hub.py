"""Model folders on the Hugging Face hub: fetched by `owner/name`, pushed from a model."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import huggingface_hub

from mplug2.composition import Parts
from mplug2.weights.folder import CONFIG, VOCAB, WEIGHTS, save_folder
from mplug2.weights.load import WeightsError


def find_folder(name: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a model: a path that exists, without the network, else a snapshot of `owner/name` on the hub.

    Args:
        name: a path, or `owner/name`; anything else comes back as a path, for the reader to say what it lacks.
        revision: branch, tag or commit on the hub (default: its main branch).

    Raises:
        WeightsError: an `owner/name` is neither here nor there.
    """
    if Path(name).exists():
        if revision is not None:
            raise ValueError(f"{name}: is on this machine and has no revision {revision!r}; leave revision out")
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        return Path(name)
    files = [CONFIG, VOCAB, WEIGHTS]
    try:
        return Path(huggingface_hub.snapshot_download(str(name), revision=revision, allow_patterns=files))
    # The hub's errors for names, revisions and connections derive from these. What is cached needs no connection.
    except (OSError, ValueError) as e:
        reason = str(e).strip().split("\n")[0] or type(e).__name__
        at = "" if revision is None else f" at revision {revision!r}"
        raise WeightsError(
            f"{name}: no such folder, and not to be had from the Hugging Face hub{at} ({type(e).__name__}: {reason})"
        ) from None


def push_folder(
    parts: Parts, vocab_file: str | Path, repo_id: str, *, private: bool = False, commit_message: str | None = None
) -> str:
    """Write a model folder and upload it to the hub as one commit; makes the repository where there is none.

    Uses the token of `hf auth login` or HF_TOKEN. Returns the repository's address. The hub's own errors pass through.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_folder(parts, vocab_file, folder)
        url = huggingface_hub.create_repo(repo_id, private=private, exist_ok=True)
        huggingface_hub.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message or f"Upload {parts.config.name}"
        )
    return str(url)
