"""Documents out of files: plain text, JSON lines, archives, compressed or not."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from rwkvx.data.folder import data_folder
from rwkvx.errors import InputError
from rwkvx.files import parse_json, read_lines, read_text, tar_members, text_of, user_path

__all__ = ["find_files", "held_out_tail", "json_lines", "read_documents", "unwrap"]

ARCHIVES = (".tar", ".tar.gz", ".tar.xz", ".tar.bz2")
TEXTS = (".txt", ".md")  # of what an archive holds
MOST_BYTES = 1 << 42  # of a file of many documents, which is never held as a whole
LARGEST_TEXT = 1 << 34  # of a file that is one document
# A text was wrapped by a width if nearly all of its lines are shorter than one of these widths.
WIDTHS, NEARLY_ALL = range(40, 91), 0.98


def find_files(names: Sequence[str], data: str | None = None) -> list[Path]:
    """The files of these names: as they are, else in the data folder.

    Raises:
        InputError: one is in neither place.
    """
    folder, found = data_folder(data), []
    for name in names:
        path = user_path(name)
        if not path.is_absolute() and not path.exists() and folder is not None:
            path = folder / name
        if not path.exists():
            raise InputError(
                f"text {name} is not there: name the data folder with --data or RWKVX_DATA"
            )
        found.append(path)
    return found


def read_documents(paths: Sequence[Path], unwrapped: bool = False) -> Iterator[str]:
    """The documents of these files, one after the other.

    A document is a text file (.txt, whatever has no other meaning), a line of JSON with a "text"
    field (.jsonl), or a text file in a tar archive; each may be compressed (.xz, .gz, .bz2).

    Args:
        unwrapped: see `unwrap`.

    Raises:
        InputError: a file that cannot be read, with its name.
    """
    for path in paths:
        for text in _documents(path):
            yield unwrap(text) if unwrapped else text


def _documents(path: Path) -> Iterator[str]:
    if path.name.endswith(ARCHIVES):
        for name, content in tar_members(path, TEXTS, MOST_BYTES):
            yield text_of(content, f"{path}: {name}")
    elif ".jsonl" in path.suffixes:
        for where, item in json_lines(path):
            if not isinstance(item.get("text"), str):
                raise InputError(f'{where}: no JSON object with a "text" field')
            yield item["text"]
    else:
        yield read_text(path, LARGEST_TEXT)


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each line stands, in words, and the object that it holds; empty lines left out.

    Raises:
        InputError: a line that holds no JSON object.
    """
    for number, line in enumerate(read_lines(path, MOST_BYTES), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            item = parse_json(line, where)
            if not isinstance(item, dict):
                raise InputError(f"{where}: no JSON object")
            yield where, item


def unwrap(text: str) -> str:
    """The text with the lines of wrapped paragraphs joined; one that is not wrapped stays as it is.

    A line was broken by its width where the next word would not have fitted into it. Every other
    end of a line was meant: of a paragraph, a verse, a heading.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    lengths = sorted(len(line) for line in lines if line.strip())
    width = lengths[int(NEARLY_ALL * (len(lengths) - 1))] if lengths else 0
    if width not in WIDTHS:
        return text
    joined = [lines[0]]
    for before, line in pairwise(lines):
        word = line.split(" ", 1)[0]
        if word and before.strip() and len(before) + 1 + len(word) > width:
            joined[-1] += " " + line
        else:
            joined.append(line)
    return "\n".join(joined)


def held_out_tail(
    documents: Iterable[str], sizes: Sequence[int], share: float
) -> Iterator[tuple[str, bool]]:
    """Every document, and whether it belongs to the tail that is held out.

    The tail is of whole documents where one begins in it, else the end of the last document.

    Args:
        sizes: of the documents in characters, known from an earlier pass.
        share: of all characters that the tail has at most.
    """
    starts = list(accumulate(sizes, initial=0))
    first = starts[-1] - int(share * starts[-1])
    whole = next((s for s in starts[:-1] if s >= first), None)
    for start, text in zip(starts, documents, strict=False):
        if first == starts[-1] or whole is not None or start + len(text) < starts[-1]:
            yield text, whole is not None and start >= whole
        else:
            cut = text.find(" ", first - start) + 1 or first - start
            yield text[:cut], False
            yield text[cut:], True
