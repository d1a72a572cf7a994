"""Where a model comes from, for the card of what is made of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml
from huggingface_hub.repocard import metadata_load

__all__ = ["HubReference", "hub_reference", "is_name", "model_name", "origin_of_folder", "origin_of_gguf"]

CARD = "README.md"
MAX_CARD_BYTES = 1 << 20
LICENSE_KEYS = ("license", "license_name", "license_link")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# File systems take 255; what a target adds to it is shorter than the rest.
MAX_NAME_BYTES = 200
SEPARATORS = {"/", "\\"}
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubReference:
    """Attributes:
    id: ``OWNER/NAME`` on the hub.
    revision: a branch, tag or commit; None for the newest.
    """

    id: str
    revision: str | None


def model_name(source: str) -> str:
    """The last part of a path or hub id, as files can be named after it; of a GGUF file without its type:
    ``Llama-3.2-1B`` of ``Llama-3.2-1B.Q4_K_M.gguf``.
    """
    path, reference = Path(source), hub_reference(source)
    name = path.resolve().name if path.exists() or reference is None else reference.id.split("/")[1]
    name = re.sub(r"(\.(I?Q\d\w*|B?F16|F32))?\.gguf$", "", name, flags=re.IGNORECASE)
    printed = "".join(letter if letter.isprintable() and letter not in SEPARATORS else "_" for letter in name)
    return printed.encode()[:MAX_NAME_BYTES].decode(errors="ignore") or "model"


def is_name(name: Any) -> bool:
    """Whether files can be named after it: what :func:`model_name` gives."""
    return (
        isinstance(name, str)
        and 0 < len(name.encode()) <= MAX_NAME_BYTES
        and name.isprintable()
        and not SEPARATORS & set(name)
        and name not in (".", "..")
    )


def hub_reference(source: str) -> HubReference | None:
    """What ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` means; None of anything else."""
    name, at, revision = source.partition("@")
    if not HUB_ID.fullmatch(name) or (at and not revision):
        return None
    return HubReference(name, revision or None)


def origin_of_folder(source: str, folder: Path) -> dict[str, str]:
    """``source``, a hub id or the folder's name; the license where the model card tells; ``base_model`` of a hub id.

    Args:
        source: what the user named; a hub id is the base model itself, and gets the commit that was fetched.
        folder: of the files; of a hub id, where the hub's cache has them.
    """
    found = _read_card(folder / CARD)
    license_facts = {key: found[key] for key in LICENSE_KEYS if _is_line(found.get(key))}
    reference = hub_reference(source)
    if Path(source).exists() or reference is None:
        return {"source": folder.resolve().name, **license_facts}
    commit = folder.name if COMMIT.fullmatch(folder.name) else reference.revision
    pinned = f"{reference.id}@{commit}" if commit else reference.id
    return {"source": pinned, "base_model": reference.id, **license_facts}


def origin_of_gguf(path: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    """What a GGUF file's metadata says, as :func:`origin_of_folder`."""
    named = {
        "license": "general.license",
        "license_name": "general.license.name",
        "license_link": "general.license.link",
    }
    origin = {key: str(metadata[name]) for key, name in named.items() if _is_line(metadata.get(name))}
    url = metadata.get("general.base_model.0.repo_url")
    base = urlparse(str(url)).path.strip("/") if _is_line(url) else ""
    return {"source": path.name, **origin, **({"base_model": base} if HUB_ID.fullmatch(base) else {})}


def _read_card(path: Path) -> dict[str, Any]:
    """The metadata of a model card; a card that cannot be read says nothing."""
    if not path.is_file() or path.stat().st_size > MAX_CARD_BYTES:
        return {}
    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()
