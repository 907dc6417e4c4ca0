"""Documents out of files: plain text, JSON lines, archives, compressed or not."""

import io
import json
import lzma
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

from rwkvx.data.folder import data_folder
from rwkvx.errors import InputError

__all__ = ["find_files", "held_out_tail", "read_documents", "unwrap"]

ARCHIVES = (".tar", ".tar.gz", ".tar.xz")
TEXTS = (".txt", ".md")  # of what an archive holds
# Of a text whose lines were wrapped by a width: nearly all are at most so long.
WRAPPED_AT_MOST, NEARLY_ALL = 90, 0.98


def find_files(names: Sequence[str], data: str | None = None) -> list[Path]:
    """The files of these names: as they are, else in the data folder.

    Raises:
        InputError: one is in neither place.
    """
    folder, found = data_folder(data), []
    for name in names:
        path = Path(name).expanduser()
        if not path.is_absolute() and not path.exists() and folder is not None:
            path = folder / name
        if not path.is_file():
            raise InputError(
                f"text {name} is not there: name the data folder with --data or RWKVX_DATA"
            )
        found.append(path)
    return found


def read_documents(paths: Sequence[Path], unwrapped: bool = False) -> Iterator[str]:
    """The documents of these files, one after the other.

    A document is a text file (.txt, .xz, whatever has no other meaning), a line of JSON with a
    "text" field (.jsonl), or a text file in a tar archive.

    Args:
        unwrapped: see `unwrap`.

    Raises:
        InputError: a file that cannot be read, with its name.
    """
    for path in paths:
        try:
            for text in _documents(path):
                yield unwrap(text) if unwrapped else text
        except (OSError, EOFError, lzma.LZMAError, tarfile.TarError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read text {path}: {error}") from error


def _documents(path: Path) -> Iterator[str]:
    if path.name.endswith(ARCHIVES):
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None and member.name.endswith(TEXTS):
                    yield file.read().decode("utf-8", errors="replace")
        return
    raw = path.read_bytes()
    text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    if ".jsonl" not in path.suffixes:
        yield text
        return
    for number, line in enumerate(io.StringIO(text), start=1):
        if line.strip():
            yield _text_field(line, f"{path}, line {number}")


def _text_field(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise InputError(f'{where}: no JSON object with a "text" field')
    return text


def unwrap(text: str) -> str:
    """The text with the lines of wrapped paragraphs joined; one that is not wrapped stays as it is.

    A line was broken by its width where the next word would not have fitted into it. Every other
    end of a line was meant: of a paragraph, a verse, a heading.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    lengths = sorted(len(line) for line in lines if line.strip())
    width = lengths[int(NEARLY_ALL * (len(lengths) - 1))] if lengths else 0
    if not 0 < width <= WRAPPED_AT_MOST:
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
    first = starts[-1] if share == 0 else starts[-1] - int(share * starts[-1])
    whole = next((s for s in starts[:-1] if s >= first), None)
    for start, text in zip(starts, documents, strict=False):
        if share == 0 or whole is not None or start + len(text) < starts[-1]:
            yield text, whole is not None and start >= whole
        else:
            cut = text.find(" ", first - start) + 1 or first - start
            yield text[:cut], False
            yield text[cut:], True
