"""Topic templates: from ``ocpp/cp/${cid}/${action}`` to MQTT topics and back.

A template is parsed once, at start. What is filled in comes from peers and is made topic-safe first, so that no charge
point can reach another topic level. Which identities would make one template speak in another one's place is computed
here as well. Pure: knows MQTT's rules for topic names (MQTT 5, 4.7), nothing of brokers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

# What MQTT forbids in any string, or lets a broker close the connection for (MQTT 5, 1.5.4: control characters,
# surrogates, non-characters; mosquitto does close), and '%' since it begins an encoded character.
_FORBIDDEN = "%\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef" + "".join(
    f"{chr(p + 0xFFFE)}{chr(p + 0xFFFF)}" for p in range(0, 0x110000, 0x10000)
)
_UNSAFE_TEXT = re.compile(f"[{_FORBIDDEN}]")
_UNSAFE_LEVEL = re.compile(rf"[/+#{_FORBIDDEN}]|^\$")
# What nearly all of them are made of; ten times as quick as looking for what is not safe.
_PLAIN = re.compile(r"[A-Za-z0-9._:-]+")
_PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")


def encode_level(value: str) -> str:
    """Make a peer's text safe as one level of a topic: ``/ + # %``, control characters and a leading ``$`` encoded."""
    return value if _PLAIN.fullmatch(value) else _UNSAFE_LEVEL.sub(_percent, value)


def encode_text(value: str) -> str:
    """Make a peer's text safe as an MQTT string that is no topic, e.g. a user property."""
    return value if _PLAIN.fullmatch(value) else _UNSAFE_TEXT.sub(_percent, value)


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass"))


class TemplateError(ValueError):
    """A template that cannot work; the text says why."""


@dataclass(frozen=True, slots=True)
class Placeholder:
    """``${cid}``; a wildcard of a topic filter is one named ``+`` or ``#``."""

    name: str


Part = str | Placeholder
Level = tuple[Part, ...]

# The user name is the identity: the login sees to that (OCPP-J 1.6, 6.2.2).
_ALIASES = {"clientid": "cid", "username": "cid"}
_WILDCARDS = ("+", "#")


class TopicTemplate:
    """``ocpp/cp/${cid}/${action}``

    text: as the operator wrote it. names: the placeholders that are still open.
    """

    def __init__(self, text: str, levels: Sequence[Level]) -> None:
        self.text = text
        self.levels = tuple(levels)
        parts: list[Part] = []
        for index, level in enumerate(self.levels):
            parts.extend(("/", *level) if index else level)
        self._parts = parts
        self._pattern = re.compile("".join(_expressions(self.levels)))
        self.names = frozenset(part.name for part in parts if isinstance(part, Placeholder)) - set(_WILDCARDS)

    def __repr__(self) -> str:
        return f"<TopicTemplate {self.text}>"

    @classmethod
    def parse(cls, text: str, names: Collection[str], wildcards: bool = False) -> TopicTemplate:
        """Parse a template. names: the placeholders it may use. Raises TemplateError."""
        if not text:
            raise TemplateError("is empty")
        if text.startswith("$") and not text.startswith("${"):
            raise TemplateError("may not begin with $")
        if _UNSAFE_TEXT.search(text):
            raise TemplateError("has % or a character that MQTT does not allow")
        levels: list[Level] = []
        for level in text.split("/"):
            if level in _WILDCARDS and wildcards:
                levels.append((Placeholder(level),))
            else:
                levels.append(tuple(_parse_level(level, names)))
        if any(level == (Placeholder("#"),) for level in levels[:-1]):
            raise TemplateError("may have # at its end only")
        if any(Placeholder("cid") in level and not _is_told_apart(level) for level in levels):
            raise TemplateError("may have no other placeholder in the level of ${cid}")
        return cls(text, levels)

    def bind(self, **values: str) -> TopicTemplate:
        """The template with some placeholders filled in; values are topic-safe."""
        return TopicTemplate(
            self.text,
            [
                _join(values.get(part.name, part) if isinstance(part, Placeholder) else part for part in level)
                for level in self.levels
            ],
        )

    def render(self, values: Mapping[str, str]) -> str:
        """Fill in topic-safe values; wildcards stay, so that a downstream template renders to a topic filter."""
        return "".join([part if isinstance(part, str) else values.get(part.name, part.name) for part in self._parts])

    def as_filter(self) -> str:
        """Write the topic filter that matches every topic of this template."""
        return "/".join("+" if (literal := _literal(level)) is None else literal for level in self.levels)

    def render_concrete(self, values: Mapping[str, str], fillers: Sequence[str]) -> str:
        """Render with each wildcard replaced by the next filler, the last filler serving all further ones."""
        waiting = list(fillers)
        topic = []
        for part in self._parts:
            if isinstance(part, str):
                topic.append(part)
            elif part.name in _WILDCARDS:
                topic.append(waiting.pop(0) if len(waiting) > 1 else waiting[0])
            else:
                topic.append(values[part.name])
        return "".join(topic)

    def match(self, topic: str) -> dict[str, str] | None:
        """The topic-safe values with which the template gives this topic, None if there are none."""
        match = self._pattern.fullmatch(topic)
        return None if match is None else match.groupdict()


def _parse_level(level: str, names: Collection[str]) -> Iterator[Part]:
    if "+" in level or "#" in level:
        raise TemplateError("may not have a wildcard here")
    position = 0
    for match in _PLACEHOLDER.finditer(level):
        if match.start() > position:
            yield level[position : match.start()]
        position = match.end()
        name = _ALIASES.get(match[1], match[1])
        if name not in names:
            allowed = ", ".join(f"${{{known}}}" for known in sorted(names))
            raise TemplateError(f"knows no {match[0]}; it may use {allowed}")
        yield Placeholder(name)
    if "${" in level[position:]:
        raise TemplateError("has an unclosed ${")
    if level[position:] or not level:
        yield level[position:]


def _is_told_apart(level: Level) -> bool:
    """Whether the identity can be read from a level: with ``${cid}-${action}`` A could speak for A-B."""
    return [part.name for part in level if isinstance(part, Placeholder) and part.name != "node"] == ["cid"]


def _join(parts: Iterator[Part]) -> Level:
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)


def _expressions(levels: Sequence[Level]) -> Iterator[str]:
    seen: set[str] = set()
    for index, level in enumerate(levels):
        if level == (Placeholder("#"),):
            # "sport/#" also matches "sport" (MQTT 5, 4.7.1.2)
            yield "(?:/.*)?" if index else ".*"
            continue
        yield "/" if index else ""
        for part in level:
            if isinstance(part, str):
                yield re.escape(part)
            elif part.name == "+":
                yield "[^/]*"
            elif part.name in seen:
                yield f"(?P={part.name})"
            else:
                seen.add(part.name)
                yield f"(?P<{part.name}>[^/]+)"


def reserved_identities(upstream: Mapping[str, TopicTemplate], downstream: TopicTemplate) -> frozenset[str]:
    """The identities, topic-safe, with which one template yields another charge point's topics of another template.

    With ``ocpp/cp/${cid}/${action}`` and ``ocpp/cp/Reply/${cid}`` that is ``Reply``; with a downstream filter
    ``ocpp/${cid}/+/+`` it is ``cp``, who would listen to everybody. upstream: by the name of the setting.
    Raises TemplateError where two templates get in each other's way for every identity.
    """
    reserved: set[str] = set()
    for name, template in upstream.items():
        overlap = _Overlap.of(template, downstream)
        if overlap is not None and overlap.same:
            raise TemplateError(f"{name} = {template.text}: dnstream.topic would bring it back to the gateway")
        for other_name, other in (*upstream.items(), ("dnstream.topic", downstream)):
            if other is template or other.levels == template.levels:
                continue
            overlap = _Overlap.of(template, other)
            if overlap is None or overlap.same:
                continue
            reserved |= overlap.mine | (overlap.theirs if other is downstream else set())
            if overlap.mine or overlap.theirs:
                continue
            if other is downstream or "cid" in template.names & other.names:
                raise TemplateError(f"{name} = {template.text} can give the same topic as {other_name} = {other.text}")
    return frozenset(reserved)


@dataclass
class _Overlap:
    """What has to hold for two templates to give one topic.

    same: that both speak of the same charge point. mine, theirs: what the identity of either has to be.
    """

    same: bool
    mine: set[str]
    theirs: set[str]

    @classmethod
    def of(cls, one: TopicTemplate, other: TopicTemplate) -> _Overlap | None:
        overlap = cls(False, set(), set())
        for mine, theirs in zip_longest(one.levels, other.levels):
            if (Placeholder("#"),) in (mine, theirs):
                break
            if mine is None or theirs is None or not overlap._level(mine, theirs):
                return None
        return overlap if len(overlap.mine) < 2 and len(overlap.theirs) < 2 else None

    def _level(self, mine: Level, theirs: Level) -> bool:
        if mine == theirs == (Placeholder("cid"),):
            self.same = True
            return True
        if _literal(theirs) is not None:
            return _identity(mine, theirs, self.mine)
        if _literal(mine) is not None:
            return _identity(theirs, mine, self.theirs)
        if mine == theirs:
            self.same = self.same or Placeholder("cid") in mine
            return True
        return _ends_agree(mine, theirs)


def _literal(level: Level) -> str | None:
    return level[0] if len(level) == 1 and isinstance(level[0], str) else None


def _identity(level: Level, literal: Level, found: set[str]) -> bool:
    """Whether a level can become a literal; what its identity is then goes into found."""
    match = re.fullmatch("".join(_expressions([level])), _literal(literal) or "")
    if match is not None and "cid" in match.groupdict():
        found.add(match["cid"])
    return match is not None


def _ends_agree(mine: Level, theirs: Level) -> bool:
    """Whether two levels with placeholders can become the same text, as far as their fixed ends tell."""
    for end in (0, -1):
        one, other = mine[end], theirs[end]
        if isinstance(one, str) and isinstance(other, str):
            short, long = sorted((one, other), key=len)
            if not (long.startswith(short) if end == 0 else long.endswith(short)):
                return False
    return True
