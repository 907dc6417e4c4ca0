"""Files as data: read within limits, and written whole or not at all.

What a file holds decides neither what is read nor how much: only regular files are opened, each
reader has a limit in bytes, and what unpacks is counted while it unpacks.
"""

from rwkvx.files.packed import TEXT_BYTES, open_packed, read_lines, read_text, tar_members, text_of
from rwkvx.files.plain import (
    JSON_BYTES,
    collector_paused,
    decoded,
    is_there,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    read_mapping,
    user_path,
)
from rwkvx.files.written import (
    flush,
    replacing,
    replacing_folder,
    write_bytes,
    write_json,
    write_text,
)
from rwkvx.files.yaml import parse_yaml, read_yaml

__all__ = [
    "JSON_BYTES",
    "TEXT_BYTES",
    "collector_paused",
    "decoded",
    "flush",
    "is_there",
    "open_packed",
    "open_regular",
    "parse_json",
    "parse_yaml",
    "read_bytes",
    "read_json",
    "read_lines",
    "read_mapping",
    "read_text",
    "read_yaml",
    "replacing",
    "replacing_folder",
    "tar_members",
    "text_of",
    "user_path",
    "write_bytes",
    "write_json",
    "write_text",
]
