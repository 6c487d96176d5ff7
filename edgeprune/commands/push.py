"""The command that publishes a bundle's checkpoint: checks its files, and sends them to a repository of the hub.

Reports and samples stay here: they may hold texts of the user's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import EngineError, InputError
from edgeprune.files import printable
from edgeprune.model.origin import CARD
from edgeprune.ondevice.bundle import CHECKPOINT, open_to_run
from edgeprune.progress import Progress

LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."


@dataclass(frozen=True)
class Pushed:
    """A repository and what is sent to it; files: bytes by name; url: of the commit, None where nothing was sent."""

    repository: str
    public: bool
    is_new: bool
    files: dict[str, int]
    url: str | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def push(bundle: Path, repository: str, public: bool, dry_run: bool, progress: Progress) -> Pushed:
    """Sends a bundle's checkpoint with its card to a repository of the hub, in one commit.

    repository: OWNER/NAME, made where it is not there: for its owner alone, unless `public`; one that is there stays as
    visible as it is. dry_run: the hub is asked who the user is and whether the repository is there, and nothing is
    changed. Raises InputError for a bundle without a checkpoint, a file that is not the manifest's, a name that is none
    and a token that the hub refuses; EngineError where the hub cannot be reached.
    """
    files = _files(bundle)
    progress.stage("ask the hub")
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        if repository.count("/") != 1:
            raise ValueError
    except ValueError:
        raise InputError(f"{printable(repository)} is no repository", "Name it as OWNER/NAME.") from None
    hub = HfApi(library_name="edgeprune")
    try:
        hub.whoami()
        is_new = not hub.repo_exists(repository)
        if dry_run:
            return Pushed(repository, public, is_new, files, None)
        hub.create_repo(repository, private=not public, exist_ok=True)
        progress.stage("send the checkpoint")
        folder = bundle / CHECKPOINT
        made = hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Fitted by edgeprune", allow_patterns=list(files)
        )
    except Exception as error:  # the hub's client raises errors of many libraries
        raise _explained(repository, error) from None
    return Pushed(repository, public, is_new, files, str(getattr(made, "commit_url", made)))


def _files(bundle: Path) -> dict[str, int]:
    """Returns the bytes of the checkpoint's files by name. Raises InputError where there is none, or one differs."""
    chosen = open_to_run(bundle)
    folder = chosen.folder / CHECKPOINT
    if not (folder / CARD).is_file():
        raise InputError(
            f"{bundle} holds no checkpoint: layers of different widths fit into no configuration, or --no-checkpoint "
            "was given",
            "Fit with --layout uniform, or copy the bundle itself.",
        )
    chosen.check(folder)
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}


def _explained(repository: str, error: Exception) -> InputError | EngineError:
    """Returns the error of the hub's client with a remedy; the token stands in none of them."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    line = printable((str(error).strip().splitlines() or [type(error).__name__])[0])
    if isinstance(error, LocalTokenNotFoundError):
        return InputError("there is no token for the hub on this machine", LOG_IN)
    if isinstance(error, OfflineModeIsEnabled):
        return InputError("HF_HUB_OFFLINE is set", "Unset it.")
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return InputError(f"the hub refuses {repository}: {line}", LOG_IN)
    if isinstance(error, HfHubHTTPError):
        return EngineError(f"the hub failed: {line}", "Try again later; a commit is whole or not there.")
    return EngineError(f"the hub cannot be reached: {line}", "Try again with network access.")
