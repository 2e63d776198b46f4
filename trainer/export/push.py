"""An exported folder to a model hub, when told to."""

from __future__ import annotations

import os
from pathlib import Path

from .trained import CannotExport


def push(folder: Path, repo: str, *, public: bool = False) -> str:
    """Upload all files of an exported folder to the repository `repo` (`owner/name`) of the hub; return its address.

    A repository that is not there is made, private unless `public`. The hub is that of `HF_ENDPOINT`, the token that of
    `hf auth login` or `HF_TOKEN`. `CannotExport` where it does not succeed; the folder stays as it is.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    api = HfApi(endpoint=endpoint, library_name="shoestring")
    kept = f"The export stays in {folder}."
    try:
        made = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Export of Shoestring")
    except HFValidationError as error:
        raise CannotExport(f"--push {repo}: {_first(error)} Write it as owner/name. {kept}") from error
    except LocalTokenNotFoundError as error:
        raise CannotExport(f"--push {repo}: no token. `hf auth login`, or set HF_TOKEN. {kept}") from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        hint = " `hf auth login` with a token that may write." if code in (401, 403) else ""
        raise CannotExport(f"--push {repo}: {endpoint} answers {code}: {_first(error)}{hint} {kept}") from error
    except Exception as error:  # of its HTTP client, which is another one from version to version
        raise CannotExport(f"--push {repo}: {endpoint} cannot be reached ({_first(error)}). {kept}") from error
    return str(made)


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."
