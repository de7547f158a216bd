"""YAML without surprises: scalars stay text, keys are unique, nothing nests or expands beyond need."""
from pathlib import Path
import stat

import yaml

from spec.errors import InputError

#: A configuration is a page of text; larger files are refused before parsing.
MAX_FILE_BYTES = 64 * 1024
MAX_DEPTH = 16


class _Loader(yaml.BaseLoader):
    """``BaseLoader`` keeps every scalar as text, so ``2:4`` stays ``2:4`` (YAML 1.1 makes it 124)."""

    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise InputError("must not use YAML anchors or aliases", field=f"line {event.start_mark.line + 1}")
        if getattr(event, "tag", None):
            raise InputError("must not use YAML tags", field=f"line {event.start_mark.line + 1}", value=event.tag)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise InputError(f"must not nest deeper than {MAX_DEPTH}", field=f"line {event.start_mark.line + 1}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            line = f"line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise InputError("must have plain text keys", field=line)
            if key.value in seen:
                raise InputError("must not repeat a key", field=line, value=key.value)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_regular_file(path, *, max_bytes):
    """Bytes of a regular file of at most ``max_bytes``; raises `InputError` for anything else."""
    path = Path(path)
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise InputError("must be a regular file", source=path)
        if info.st_size > max_bytes:
            raise InputError(f"must be at most {max_bytes} bytes", source=path, value=info.st_size)
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise InputError(f"must be readable ({error.strerror})", source=path) from error
    if len(data) > max_bytes:
        raise InputError(f"must be at most {max_bytes} bytes", source=path)
    return data


def load(path):
    """Parse a YAML file whose top level is a mapping; every scalar is returned as text.

    Raises: InputError, naming file and line, for unreadable, oversized, malformed, empty or non-mapping files, for
    repeated keys, anchors, aliases and tags.
    """
    raw = read_regular_file(path, max_bytes=MAX_FILE_BYTES)
    try:
        tree = yaml.load(raw.decode("utf-8"), Loader=_Loader)  # noqa: S506 (a BaseLoader builds only text, lists, maps)
    except InputError as error:
        raise error.within(path) from None
    except UnicodeDecodeError as error:
        raise InputError(f"must be UTF-8 text (byte {error.start})", source=path) from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "text"
        raise InputError(f"must be YAML ({getattr(error, 'problem', None) or 'malformed'})", source=path,
                         field=where) from None
    if not isinstance(tree, dict):
        raise InputError("must be a YAML mapping of fields", source=path)
    return tree
