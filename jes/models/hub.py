"""Where a model is: a folder, the embedded model, or a copy from the hub."""

import os
from pathlib import Path
from re import fullmatch

from jes.models.safetensors_files import WeightsError, weight_files

EMBEDDED = {
    name: Path(__file__).parent / name.replace("-", "_")
    for name in ("tiny", "tiny-knowing")
}
"""The models that come with the package: of `configs/tiny.py`, and of
`configs/esma_triviaqa.py:tiny`."""

_DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model")
_SECONDS = 5.0
"""How long the hub may take to answer before it counts as out of reach."""


def locate(name: str | os.PathLike[str]) -> Path:
    """The folder of a model.

    Args:
      name: a folder; 'tiny' or 'tiny-knowing', the embedded models (a folder of that
        name is './tiny'); or a hub id, 'owner/model'. A complete copy in the hub's
        cache is used as it is, without a look at the network.

    Raises:
      WeightsError: if there is no such folder and, for a hub id, no copy can be had.
    """
    if name in EMBEDDED:
        if not EMBEDDED[str(name)].is_dir():
            raise WeightsError(f"this installation of jes lacks {EMBEDDED[str(name)]}")
        return EMBEDDED[str(name)]
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise WeightsError(f"{folder} is a file; a model is a folder")
    if not fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        raise WeightsError(
            f"there is no folder {str(name)!r} (and a model on the Hugging Face hub "
            f"has a name like 'Qwen/Qwen2.5-0.5B-Instruct')"
        )
    return _cached(str(name)) or _downloaded(str(name))


def _cached(name: str) -> Path | None:
    """The copy in the hub's cache, if it is there with all its weights.

    Who has only used the tokenizer has a folder in the cache without weights.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        weight_files(folder)
    except (LocalEntryNotFoundError, WeightsError):
        return None
    return folder if (folder / "config.json").is_file() else None


def _downloaded(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        # Asked first because it takes a time limit: behind a firewall that drops
        # packets, the download alone would wait and retry for minutes.
        HfApi().model_info(name, timeout=_SECONDS)
        return Path(snapshot_download(name, allow_patterns=list(_DOWNLOADED)))
    # Any exception: which HTTP library raises depends on the version of the hub's.
    except Exception as error:
        raise WeightsError(
            f"there is no folder {name!r}, and from the Hugging Face hub it could not "
            f"be had: {_reason(name, error)}. Either give the path of a folder that "
            "holds config.json, model.safetensors and the tokenizer, or run "
            "configs/tiny.py, whose model is part of the package and needs no download"
        ) from error


def _reason(name: str, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return (
            f"it is gated (accept its terms on https://huggingface.co/{name}, then "
            "log in with `hf auth login`)"
        )
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such model, or it is private (`hf auth login`)"
    first_line = str(error).partition("\n")[0]
    return f"no network, or the hub does not answer ({first_line})"
