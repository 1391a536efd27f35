"""Edits of a YAML file that change the lines they must and leave every other byte as the person wrote it.

Theory of operation. Parsing gives two things: the values (ruamel.yaml's round-trip mappings) and the node tree, in
which every key and value knows the range of text that it came from. An edit is a splice of that text: replace
a scalar's range, cut out an entry's lines, insert an entry's lines behind the last one of its mapping. A comment
above the next section therefore stays above the next section, which dumping a changed tree does not achieve.

A splice is only a proposal: the new text is parsed again, and must give exactly the values that the edit wanted.
Where it does not (flow style, tabs, anything unforeseen), the edit is done by ruamel.yaml's own round trip, which
keeps comments but may move some and change indentation.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError, YAMLStreamError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from actors.config.reader import Problem
from protocol.errors import PeerupError

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_-]*\Z")
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
_NOT_PLAIN = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n", "nan", "inf"})
_FALLBACK_WIDTH = 4096  # never fold a line that a person wrote


class YamlSyntaxError(PeerupError):
    """A text is not YAML, or not a mapping. `problem` says where."""

    code = "bad-yaml"

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def parse_yaml(text: str) -> Any:
    """The values in a YAML text, as ruamel.yaml's round-trip types.

    Raises:
        YamlSyntaxError: with line and column.
    """
    try:
        values = _yaml().load(text)
    except MarkedYAMLError as error:
        raise YamlSyntaxError(_syntax_problem(error)) from error
    except (YAMLError, YAMLStreamError, ValueError, RecursionError) as error:
        first_line = str(error).strip().splitlines()[:1]
        raise YamlSyntaxError(Problem("", f"not YAML: {first_line[0] if first_line else error!r}")) from error
    if values is None:
        raise YamlSyntaxError(Problem("", "the file is empty"))
    if not isinstance(values, Mapping):
        raise YamlSyntaxError(Problem("", "the file is not a mapping of keys to values", 1))
    return values


def parse_parts(text: str) -> dict[str, Any]:
    """Of a text that is not YAML as a whole: the entries at its left margin that are YAML each by itself.

    Of an entry that is not, the entries one level below it that are. What stands twice is left out. Where lines are
    taken apart that belong together, something else may be read than was written, or nothing; so this is only good for
    what can do no harm whatever it says.
    """
    found: dict[str, Any] = {}
    twice: set[str] = set()
    for block in _blocks(_whole_lines(text), 0):
        for key, value in _parse_block(block).items():
            if key in found:
                twice.add(key)
            found[key] = value
    return {key: value for key, value in found.items() if key not in twice}


def _parse_block(block: list[str]) -> dict[str, Any]:
    with contextlib.suppress(YamlSyntaxError):
        return dict(parse_yaml("".join(block)))
    head, below = block[0], block[1:]
    inner = next((line for line in below if line.strip() and not line.lstrip().startswith("#")), "")
    indent = len(inner) - len(inner.lstrip(" "))
    if not indent:
        return {}
    entries: dict[str, Any] = {}
    name, twice = "", set()
    for part in _blocks("".join(below), indent):
        with contextlib.suppress(YamlSyntaxError):
            ((name, values),) = parse_yaml("".join([head, *part])).items()
            if not isinstance(values, Mapping):
                continue
            twice |= entries.keys() & values.keys()
            entries.update(values)
    return {name: {key: value for key, value in entries.items() if key not in twice}} if name else {}


def _blocks(text: str, indent: int) -> list[list[str]]:
    """The lines, cut before each that begins an entry at this indentation. What stands before the first is left out."""
    blocks: list[list[str]] = []
    for line in text.splitlines(keepends=True):
        content = line.lstrip(" ")
        begins = len(line) - len(content) == indent and content.strip() and content[0] not in "#-\t.%"
        if begins:
            blocks.append([])
        if blocks:
            blocks[-1].append(line)
    return blocks


def set_value(text: str, path: Sequence[str], value: Any) -> str:
    """The text with this value at this path of keys; mappings on the way are made where they are missing.

    Raises:
        YamlSyntaxError: the text is not YAML, or something on the way is not a mapping.
    """
    text = _whole_lines(text)
    wanted = _plain(parse_yaml(text))
    _walk(wanted, path)[path[-1]] = _plain(value)
    return _proven(_splice_value(text, path, value), wanted) or _must_be(_round_trip(text, path, value), wanted)


def delete_value(text: str, path: Sequence[str]) -> str:
    """The text without the entry at this path, or unchanged if there is none.

    Raises:
        YamlSyntaxError: the text is not YAML, or something on the way is not a mapping.
    """
    text = _whole_lines(text)
    wanted = _plain(parse_yaml(text))
    parent = _walk(wanted, path)
    if path[-1] not in parent:
        return text
    del parent[path[-1]]
    return _proven(_splice_out(text, path), wanted) or _must_be(_round_trip(text, path, None, delete=True), wanted)


def render_entry(key: str, value: Any, indent: int, step: int = 2) -> str:
    """Lines of block YAML for one entry of a mapping: scalars, lists of scalars and mappings of these."""
    margin = " " * indent
    head = f"{margin}{_scalar(key)}:"
    if isinstance(value, Mapping):
        inside = "".join(render_entry(name, item, indent + step, step) for name, item in value.items())
        return f"{head}\n{inside}" if value else f"{head} {{}}\n"
    if isinstance(value, list | tuple):
        items = "".join(f"{margin}{' ' * step}- {_scalar(item)}\n" for item in value)
        return f"{head}\n{items}" if value else f"{head} []\n"
    return f"{head} {_scalar(value)}\n"


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.match(value) and value.lower() not in _NOT_PLAIN:
        return value
    # JSON's scalars are YAML, but for characters that YAML takes for line ends or does not allow.
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def _yaml() -> YAML:
    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = _FALLBACK_WIDTH
    yaml.allow_duplicate_keys = False
    return yaml


def _syntax_problem(error: MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    reason = (error.problem or error.context or "not YAML").strip().replace("\n", " ")
    if mark is None:
        return Problem("", f"not YAML: {reason}")
    return Problem("", f"column {mark.column + 1}: not YAML: {reason}", mark.line + 1)


def _plain(value: Any) -> Any:
    """The same values without ruamel's types, to compare and to change."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return copy.copy(value)


def _walk(values: Any, path: Sequence[str]) -> Any:
    """The mapping that holds the last key of the path; missing mappings on the way are made."""
    here = values
    for depth, key in enumerate(path[:-1]):
        below = here.get(key)
        if below is None:
            below = here[key] = {}
        if not isinstance(below, dict):
            raise YamlSyntaxError(Problem(".".join(path[: depth + 1]), "must be a mapping of keys to values"))
        here = below
    return here


def _proven(text: str | None, wanted: Any) -> str | None:
    """The proposed text if it has the wanted values; an emptied mapping may have become nothing."""
    if text is None:
        return None
    try:
        found = _plain(parse_yaml(text))
    except YamlSyntaxError:
        return None
    return text if _without_empty(found) == _without_empty(wanted) else None


def _must_be(text: str, wanted: Any) -> str:
    proven = _proven(text, wanted)
    if proven is None:
        raise YamlSyntaxError(Problem("", "this cannot be changed without harm to the rest; edit the file by hand"))
    return proven


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items() if item not in (None, {})}
    return value


def _round_trip(text: str, path: Sequence[str], value: Any, *, delete: bool = False) -> str:
    yaml = _yaml()
    values = yaml.load(text)
    here = values
    for key in path[:-1]:
        if here.get(key) is None:
            here[key] = {}
        here = here[key]
    if delete:
        del here[path[-1]]
    else:
        here[path[-1]] = value
    out = io.StringIO()
    yaml.dump(values, out)
    return out.getvalue()


def _splice_value(text: str, path: Sequence[str], value: Any) -> str | None:
    root = _compose(text)
    here: Node = root
    for depth, key in enumerate(path):
        if not isinstance(here, MappingNode):
            return None
        entry = _entry(here, key)
        if entry is None:
            if here is not root and (here.flow_style or not here.value):
                return None
            return _insert(text, here, path[depth:], value)
        found = entry[1]
        if depth == len(path) - 1:
            if isinstance(found, SequenceNode) and isinstance(value, list | tuple):
                return _replace_items(text, entry, value)
            return _replace(text, found, value)
        if _is_empty(found):
            return _fill(text, entry, path[depth + 1 :], value)
        here = found
    return None


def _splice_out(text: str, path: Sequence[str]) -> str | None:
    here: Node = _compose(text)
    for key in path[:-1]:
        if not isinstance(here, MappingNode) or (entry := _entry(here, key)) is None:
            return None
        here = entry[1]
    if not isinstance(here, MappingNode) or here.flow_style or (entry := _entry(here, path[-1])) is None:
        return None
    begin = _line_start(text, entry[0].start_mark.index)
    end = _content_end(text, entry)
    return text[:begin] + text[end:]


def _compose(text: str) -> Node:
    node: Node = _yaml().compose(text)
    return node


def _entry(mapping: MappingNode, key: str) -> tuple[Node, Node] | None:
    for name, value in mapping.value:
        if isinstance(name, ScalarNode) and name.value == key:
            return name, value
    return None


def _is_empty(node: Node) -> bool:
    """Nothing at all, `null`, or `{}`."""
    if isinstance(node, MappingNode):
        return not node.value
    return isinstance(node, ScalarNode) and not node.style and node.value in ("", "~", "null", "Null", "NULL")


def _replace(text: str, node: Node, value: Any) -> str | None:
    if not isinstance(node, ScalarNode) or node.style in ("|", ">") or isinstance(value, Mapping | list | tuple):
        return None
    begin, end = node.start_mark.index, node.end_mark.index
    space = "" if text[begin - 1 : begin].isspace() else " "
    return f"{text[:begin]}{space}{_scalar(value)}{text[end:]}"


def _replace_items(text: str, entry: tuple[Node, Node], value: Sequence[Any]) -> str | None:
    """Take out the items of a list that are not wanted any more, and add the new ones at its end."""
    key, items = entry
    assert isinstance(items, SequenceNode)
    if items.flow_style or not value:
        begin, end = _line_start(text, key.start_mark.index), _content_end(text, entry)
        if "#" in text[begin:end] or (items.flow_style and _line_start(text, items.end_mark.index) != begin):
            return None
        return text[:begin] + render_entry(key.value, value, key.start_mark.column) + text[end:]
    if not all(isinstance(item, ScalarNode) and item.style not in ("|", ">") for item in items.value):
        return None
    rest = list(value)
    spans = []
    for item in items.value:
        begin = _line_start(text, item.start_mark.index)
        spans.append((begin, text.index("\n", item.end_mark.index) + 1))
        if rest and item.value == rest[0]:
            rest.pop(0)
            spans.pop()
    last = text.index("\n", items.value[-1].end_mark.index) + 1
    text = text[:last] + "".join(f"{' ' * items.start_mark.column}- {_scalar(item)}\n" for item in rest) + text[last:]
    for begin, end in reversed(spans):
        text = text[:begin] + text[end:]
    return text


def _insert(text: str, mapping: MappingNode, path: Sequence[str], value: Any) -> str:
    """Put a new entry behind the last one of a block mapping."""
    indent = mapping.value[0][0].start_mark.column if mapping.value else 0
    end = _content_end(text, mapping.value[-1]) if mapping.value else len(text)
    for key in reversed(path[1:]):
        value = {key: value}
    return text[:end] + render_entry(path[0], value, indent, _step(mapping)) + text[end:]


def _fill(text: str, entry: tuple[Node, Node], path: Sequence[str], value: Any) -> str | None:
    """Give a mapping that is empty its first entry."""
    key, empty = entry
    begin, end = empty.start_mark.index, empty.end_mark.index
    if isinstance(empty, ScalarNode) and empty.value == "":  # the mark may lie lines below the key
        begin = end = text.index(":", key.end_mark.index) + 1
    line_end = text.index("\n", end)
    rest_of_line = text[end:line_end]
    if rest_of_line.strip() and not rest_of_line.lstrip().startswith("#"):
        return None
    for name in reversed(path[1:]):
        value = {name: value}
    lines = render_entry(path[0], value, key.start_mark.column + 2)
    return f"{text[:begin].rstrip(' ')}{rest_of_line.rstrip()}\n{lines}{text[line_end + 1 :]}"


def _step(mapping: MappingNode) -> int:
    """How far this file indents, judged by the first entry that has something below it."""
    for key, value in mapping.value:
        if isinstance(value, MappingNode) and value.value and not value.flow_style:
            return max(1, int(value.value[0][0].start_mark.column) - int(key.start_mark.column))
    return 2


def _whole_lines(text: str) -> str:
    return text if text.endswith("\n") else f"{text}\n"


def _line_start(text: str, index: int) -> int:
    return text.rfind("\n", 0, index) + 1


def _content_end(text: str, entry: tuple[Node, Node]) -> int:
    """Where the lines of a block entry end: behind its last line that is neither blank nor a comment."""
    key, value = entry
    begin = _line_start(text, key.start_mark.index)
    if isinstance(value, ScalarNode) and value.value == "" and not value.style:
        last = int(key.end_mark.index)  # nothing has no place of its own
    else:
        last = int(value.end_mark.index)
    if not isinstance(value, MappingNode | SequenceNode) or value.flow_style:
        if text[last - 1 : last] != "\n":
            last = text.index("\n", last) + 1
    else:
        # A block collection's end mark lies at the next token, behind blank lines and comments that are not its own.
        last = _line_start(text, last)
    lines = text[begin:last].splitlines(keepends=True)
    while len(lines) > 1 and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
        lines.pop()
    return begin + sum(map(len, lines))
