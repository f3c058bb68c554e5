"""Push exports to repositories of the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from lightning_distill.errors import ConfigurationError, RunError


def check_push(name: str) -> None:
    """Check before an export that it can be pushed, as far as this is known without a network.

    Args:
        name: Repository, as owner/name.

    Raises:
        ConfigurationError: If the name is invalid, there is no token, or huggingface_hub is in offline mode.
    """
    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError("the name has no owner")
    except HFValidationError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigurationError(f"push_to_hub is {name!r} ({reason}); set it to owner/name") from error
    if constants.HF_HUB_OFFLINE:
        raise ConfigurationError(
            f"push_to_hub is {name!r}, but the environment variable HF_HUB_OFFLINE is set; unset it, or leave push_to_hub out"
        )
    if get_token() is None:
        raise ConfigurationError(
            f"push_to_hub is {name!r}, but there is no token of the hub; log in with `hf auth login`, or set HF_TOKEN"
        )


def push(directory: Path, name: str, public: bool = False) -> str:
    """Create a repository if it does not exist, and upload a directory to it in one commit or more.

    Args:
        directory: Directory of an export, or of several.
        name: Repository, as owner/name.
        public: Whether the repository is public. One that exists has to be so already, or not.

    Returns:
        Address of the repository.

    Raises:
        RunError: If the hub refuses or cannot be reached. The directory remains as it is.
    """
    api = HfApi()
    try:
        url = api.create_repo(name, private=not public, exist_ok=True)
        is_private = bool(api.repo_info(url.repo_id).private)
        if is_private == public:
            found, wanted = ("private", "false") if is_private else ("public", "true")
            raise RunError(
                f"{directory} is exported, but not pushed: {name!r} exists and is {found}; set public to {wanted}, or "
                "push_to_hub to another name"
            )
        api.upload_folder(repo_id=url.repo_id, folder_path=directory, commit_message="Export a few-step student")
    except RunError:
        raise
    except Exception as error:  # whatever the hub's client of the day raises, the remedy is the same
        private = "" if public else " --private"
        raise RunError(
            f"{directory} is exported, but not pushed to {name!r} ({_reason(error)}); when this is solved, run "
            f"`hf upload {name} {directory} .{private}`"
        ) from error
    return str(url)


def _reason(error: Exception) -> str:
    """First sentence of an error, with the status of the hub's answer."""
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = f"{error.response.status_code} {error.response.reason_phrase}"
        return f"{status}: {error.server_message.strip()}" if error.server_message else status
    return " ".join(str(error).split())[:300] or type(error).__name__
