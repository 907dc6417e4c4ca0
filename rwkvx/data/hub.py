"""Documents out of Hugging Face data sets: on the hub, or in a folder."""

from collections.abc import Iterator
from typing import Any

from rwkvx.errors import InputError, shown
from rwkvx.files import user_path

__all__ = ["hub_documents"]


def hub_documents(
    name: str, subset: str = "", split: str = "train", column: str = "text", streaming: bool = True
) -> Iterator[str]:
    """One column of a data set, item by item.

    Args:
        name: of a data set on the hub, or a folder: one that `save_to_disk` wrote, or one of data
            files (Parquet, JSON lines, text).
        streaming: read items as they come instead of downloading the whole first.

    Raises:
        InputError: the library is missing, there is no such data set, split or column.
    """
    try:
        from datasets import load_dataset, load_from_disk
    except ImportError as error:
        raise InputError("this needs the package datasets: pip install 'rwkvx[train]'") from error
    folder = user_path(name)
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            found: Any = load_from_disk(str(folder))
            items = found[split] if isinstance(found, dict) else found
        else:
            items = load_dataset(name, subset or None, split=split, streaming=streaming)
        for item in items:
            text = item.get(column)
            if not isinstance(text, str):
                raise InputError(f"the data set {shown(name)} has no text in column {column!r}")
            yield text
    except InputError:
        raise
    except Exception as error:  # the library's errors are of many classes
        raise InputError(f"cannot read the data set {shown(name)}: {error}") from error
