"""Uploading a package to the Hugging Face hub."""

import glob
from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from mgptq_export.manifest import read_manifest, verify
from mgptq_runtime.errors import BadInputError, PackageError
from mgptq_runtime.package import MANIFEST_FILE

__all__ = ["push"]


def push(package: Path, repository: str, *, private: bool = False, endpoint: str | None = None) -> str:
    """Upload a package to a model repository, which is created where there is none. Its ``README.md`` is the card.

    Files of an earlier package there that this one does not have are deleted; other files stay.

    Args:
        package: a folder written by :func:`mgptq_export.pipeline.run`; its files must be what its manifest says.
        repository: ``OWNER/NAME``.
        private: whether a new repository is.
        endpoint: of the hub; None for the one that huggingface_hub is set to.

    Returns:
        the address of the upload.

    Raises:
        PackageError: no package, or a file is not as its manifest says.
        BadInputError: a name that the hub does not take, no access, no connection.
    """
    manifest = read_manifest(package)
    if problems := verify(package):
        first = problems[0]
        raise PackageError(
            f"{package / first['path']} {first['problem']}; make the package again before it is uploaded"
        )
    if repository.count("/") != 1:
        raise BadInputError(f"{repository} is no name for a repository; give OWNER/NAME")
    try:
        validate_repo_id(repository)
        api = HfApi(endpoint=endpoint)
        api.create_repo(repository, private=private, exist_ok=True)
        message = f"{manifest['name']} at {manifest['bits']['stored']:.4g} bits"
        listed = {MANIFEST_FILE, *(file["path"] for file in manifest["files"])}
        return str(
            api.upload_folder(
                repo_id=repository,
                folder_path=package,
                commit_message=message,
                allow_patterns=[glob.escape(name) for name in sorted(listed)],
                delete_patterns=[glob.escape(name) for name in sorted(_files_there(api, repository) - listed)],
            )
        )
    except HFValidationError as error:
        raise BadInputError(f"{repository} is no name for a repository: {error}; give OWNER/NAME") from error
    except HfHubHTTPError as error:
        raise BadInputError(
            f"the hub did not take the package for {repository} ({error}); log in with: hf auth login, "
            "and check the name"
        ) from error
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise BadInputError(f"the hub cannot be reached ({error}); check the connection") from error


def _files_there(api: HfApi, repository: str) -> set[str]:
    """What the manifest of a package that was uploaded before lists; nothing where there is none."""
    try:
        downloaded = Path(api.hf_hub_download(repository, MANIFEST_FILE))
        return {file["path"] for file in read_manifest(downloaded.parent)["files"]}
    except (EntryNotFoundError, PackageError):  # another program's manifest is none of ours
        return set()
