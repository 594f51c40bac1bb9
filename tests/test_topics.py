"""Topic templates: what they render, what they match, and whose identity they cannot bear."""

from __future__ import annotations

from itertools import product
from unicodedata import category
from urllib.parse import unquote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ocppgw.topics import TemplateError, TopicTemplate, encode_level, encode_text, reserved_identities

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a machine that is busy
NAMES = ("cid", "node", "version", "username", "action", "type", "id")
DEFAULTS = {
    "upstream.topic": "ocpp/cp/${cid}/${action}",
    "upstream.reply_topic": "ocpp/cp/Reply/${cid}",
    "upstream.error_topic": "ocpp/cp/Error/${cid}",
    "presence.topic": "ocpp/cp/Status/${cid}",
}
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
LEVELS = ANY_TEXT.map(encode_level).filter(bool)


def parse(text: str) -> TopicTemplate:
    return TopicTemplate.parse(text, NAMES)


def parse_filter(text: str) -> TopicTemplate:
    return TopicTemplate.parse(text, NAMES, wildcards=True)


def reserved(upstream: dict[str, str], downstream: str = "ocpp/cs/${cid}/+/+") -> frozenset[str]:
    return reserved_identities({name: parse(text) for name, text in upstream.items()}, parse_filter(downstream))


# Topic-safe text (MQTT 5, 1.5.4 and 4.7)


def is_allowed(character: str) -> bool:
    """Whether MQTT takes it: no control character, no surrogate, no non-character."""
    code = ord(character)
    return category(character) not in ("Cc", "Cs") and code & 0xFFFE != 0xFFFE and not 0xFDD0 <= code <= 0xFDEF


@PATIENT
@given(ANY_TEXT)
def test_a_level_never_leaves_its_place(text):
    level = encode_level(text)
    assert not set(level) & set("/+#")
    assert not level.startswith("$")
    assert all(map(is_allowed, level))
    level.encode()


@PATIENT
@given(ANY_TEXT)
def test_text_beside_topics_keeps_what_mqtt_allows(text):
    safe = encode_text(text)
    assert all(map(is_allowed, safe))
    assert unquote(safe, errors="surrogatepass") == text


@PATIENT
@given(ANY_TEXT)
def test_a_level_says_which_text_it_was(text):
    # So no two identities share a level.
    assert unquote(encode_level(text), errors="surrogatepass") == text


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("CP-1 é", "CP-1 é"),
        ("a/b+c#d%e", "a%2Fb%2Bc%23d%25e"),
        ("$SYS", "%24SYS"),
        ("a$b", "a$b"),
        ("\0\n\x7f\x85", "%00%0A%7F%C2%85"),
        ("\ufdd0\uffff\U0001ffff", "%EF%B7%90%EF%BF%BF%F0%9F%BF%BF"),
        ("\ud800", "%ED%A0%80"),
        ("RDAM|123:4", "RDAM|123:4"),
    ],
)
def test_what_is_encoded_and_what_is_left(text, level):
    assert encode_level(text) == level


# Rendering and matching

TEMPLATES = st.lists(
    st.tuples(st.sampled_from(["", "cp-", "x"]), st.sampled_from(NAMES), st.sampled_from(["", "-cp", "."])),
    min_size=1,
    max_size=5,
    unique_by=lambda level: "cid" if level[1] == "username" else level[1],
).map(lambda levels: "/".join(f"{before}${{{name}}}{after}" for before, name, after in levels))


@PATIENT
@given(st.data())
def test_a_template_matches_what_it_rendered(data):
    template = parse(data.draw(TEMPLATES))
    values = {name: data.draw(LEVELS) for name in sorted(template.names)}
    assert template.match(template.render(values)) == values


@PATIENT
@given(st.data())
def test_bound_values_are_no_longer_open(data):
    template = parse(data.draw(TEMPLATES))
    values = {name: data.draw(LEVELS) for name in sorted(template.names)}
    bound = template.bind(**values)
    assert bound.names == frozenset()
    assert bound.render({}) == template.render(values)


def test_a_template_that_names_one_placeholder_twice_matches_only_equal_values():
    template = parse("${cid}/x/${cid}")
    assert template.match("A/x/A") == {"cid": "A"}
    assert template.match("A/x/B") is None


def test_clientid_and_username_are_other_names_of_the_identity():
    values = {"cid": "CP1"}
    assert parse("ocpp/${clientid}").render(values) == parse("ocpp/${username}").render(values) == "ocpp/CP1"


@pytest.mark.parametrize(
    ("template", "topic", "cid"),
    [
        ("ocpp/cs/${cid}/+/+", "ocpp/cs/CP1/Request/1", "CP1"),
        ("ocpp/cs/${cid}/+/+", "ocpp/cs/CP1//", "CP1"),
        ("ocpp/cs/${cid}/+/+", "ocpp/cs/CP1/Request", None),
        ("ocpp/cs/${cid}/+/+", "ocpp/cs//Request/1", None),
        ("ocpp/cs/${cid}/+/+", "ocpp/cs/CP1/Request/1/2", None),
        ("ocpp/cs/${cid}/#", "ocpp/cs/CP1/a/b/c", "CP1"),
        ("ocpp/cs/${cid}/#", "ocpp/cs/CP1", "CP1"),  # MQTT 5, 4.7.1.2
        ("ocpp/cs/${cid}/#", "ocpp/cs/CP1x\n/a", "CP1x\n"),
        ("+/${cid}", "any/CP1", "CP1"),
        ("o.c/${cid}", "oxc/CP1", None),
    ],
)
def test_a_filter_matches_what_a_broker_would_deliver(template, topic, cid):
    values = parse_filter(template).match(topic)
    assert (None if values is None else values["cid"]) == cid


def test_a_filter_renders_with_its_wildcards():
    assert parse_filter("ocpp/cs/${cid}/+/#").render({"cid": "CP1"}) == "ocpp/cs/CP1/+/#"


@pytest.mark.parametrize(
    ("template", "topic"),
    [
        ("ocpp/cs/${cid}/+/+", "ocpp/cs/CP1/Reply/Boot"),
        ("ocpp/cs/${cid}", "ocpp/cs/CP1"),
        ("+/${cid}/+/+/+", "Reply/CP1/Boot/7/7"),
        ("ocpp/cs/${cid}/#", "ocpp/cs/CP1/Reply"),
    ],
)
def test_wildcards_are_filled_in_order_for_a_concrete_topic(template, topic):
    parsed = parse_filter(template)
    assert parsed.render_concrete({"cid": "CP1"}, ["Reply", "Boot", "7"]) == topic
    assert parsed.match(topic) == {"cid": "CP1"}


def test_a_template_as_a_filter_matches_all_of_its_topics():
    assert parse("ocpp/cp/${cid}/x-${action}").as_filter() == "ocpp/cp/+/+"


def test_a_template_shows_itself_as_it_was_written():
    assert repr(parse("a/${cid}")) == "<TopicTemplate a/${cid}>"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("$SYS/${cid}", "may not begin with $"),
        ("$share/g/${cid}", "may not begin with $"),
        ("a/+/${cid}", "may not have a wildcard here"),
        ("a/${cid}/#", "may not have a wildcard here"),
        ("a/x+/${cid}", "may not have a wildcard here"),
        ("a/${nope}", "knows no ${nope}; it may use ${action}, ${cid}"),
        ("a/${}", "knows no ${}"),
        ("a/${cid", "has an unclosed ${"),
        ("a/${cid/${action}", "has an unclosed ${"),
        ("a%2Fb", "has % or a character that MQTT does not allow"),
        ("a\0b", "has % or a character that MQTT does not allow"),
        ("a/${cid}-${action}", "may have no other placeholder in the level of ${cid}"),
        ("a/${version}${username}", "may have no other placeholder in the level of ${cid}"),
        ("a/${cid}${clientid}", "may have no other placeholder in the level of ${cid}"),
    ],
)
def test_a_template_that_cannot_work_is_refused(text, problem):
    with pytest.raises(TemplateError) as caught:
        parse(text)
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a/#/${cid}", "may have # at its end only"),
        ("a/x+/${cid}", "may not have a wildcard here"),
        ("a/${cid}#", "may not have a wildcard here"),
    ],
)
def test_a_filter_that_cannot_work_is_refused(text, problem):
    with pytest.raises(TemplateError, match=problem):
        parse_filter(text)


def test_the_node_may_stand_beside_the_identity():
    assert parse("a/${node}-${cid}").bind(node="gw").render({"cid": "CP1"}) == "a/gw-CP1"


# Reserved identities and loops (contract, 2 and 3)


@pytest.mark.parametrize(
    ("changes", "downstream", "identities"),
    [
        ({}, "ocpp/cs/${cid}/+/+", {"Reply", "Error", "Status"}),
        ({"override.Boot": "ocpp/cp/${cid}/Notify/${action}"}, "ocpp/cs/${cid}/+/+", {"Reply", "Error", "Status"}),
        ({"override.Boot": "ocpp/cp/Boot/${cid}"}, "ocpp/cs/${cid}/+/+", {"Reply", "Error", "Status", "Boot"}),
        ({"override.Boot": "ocpp/cp/all/Boot"}, "ocpp/cs/${cid}/+/+", {"Reply", "Error", "Status", "all"}),
        ({"invalid": "ocpp/gateway/gw/invalid"}, "ocpp/${cid}/+/+", {"Reply", "Error", "Status", "cp", "gateway"}),
        ({"upstream.topic": "ocpp/cp/x-${cid}/${action}"}, "ocpp/cs/${cid}/+/+", set()),
        ({"upstream.topic": "ocpp/cp/R${cid}/${action}"}, "ocpp/cs/${cid}/+/+", {"eply"}),
        ({"upstream.topic": "ocpp/cp/${username}/${action}"}, "ocpp/cs/${cid}/+/+", {"Reply", "Error", "Status"}),
        ({"upstream.topic": "ocpp/up"}, "ocpp/cs/${cid}/+/+", set()),
        ({}, "${cid}/#", {"Reply", "Error", "Status", "ocpp"}),
        ({"upstream.topic": "ocpp/${cid}/${action}"}, "ocpp/cs/${cid}", {"cs"}),
    ],
)
def test_identities_that_would_speak_in_another_ones_place(changes, downstream, identities):
    assert reserved({**DEFAULTS, **changes}, downstream) == identities


def test_a_mountpoint_changes_nothing_about_reserved_identities():
    mounted = {name: f"site/7/{text}" for name, text in DEFAULTS.items()}
    assert reserved(mounted, "site/7/ocpp/cs/${cid}/+/+") == {"Reply", "Error", "Status"}
    assert reserved(mounted, "site/7/ocpp/${cid}/+/+") == {"Reply", "Error", "Status", "cp"}


@pytest.mark.parametrize(
    "downstream", ["ocpp/cp/${cid}/+", "ocpp/cp/${cid}/#", "ocpp/+/${cid}/+", "ocpp/cp/Reply/${cid}"]
)
def test_a_filter_that_brings_messages_back_is_refused(downstream):
    with pytest.raises(TemplateError, match=r"dnstream\.topic would bring it back to the gateway"):
        reserved(DEFAULTS, downstream)


def test_an_action_that_could_be_an_identity_is_refused():
    with pytest.raises(TemplateError) as caught:
        reserved({"upstream.topic": "up/${action}"}, "up/${cid}")
    assert str(caught.value) == "upstream.topic = up/${action} can give the same topic as dnstream.topic = up/${cid}"
    with pytest.raises(TemplateError, match="can give the same topic"):
        reserved({"upstream.topic": "a/${cid}/${action}", "upstream.reply_topic": "a/${action}/${cid}"})


def test_fixed_ends_that_differ_keep_templates_apart():
    with pytest.raises(TemplateError, match="can give the same topic"):
        reserved({"upstream.topic": "a/x${cid}/b", "upstream.reply_topic": "a/xx${cid}/b"})
    assert reserved({"upstream.topic": "a/x${cid}/b", "upstream.reply_topic": "a/y${cid}/b"}) == frozenset()
    assert reserved({"upstream.topic": "a/${cid}x/b", "upstream.reply_topic": "a/${cid}y/b"}) == frozenset()


WORDS = ("a", "b", "xa", "ay", "c")
UPSTREAM = st.lists(st.sampled_from(["a", "b", "${cid}", "x${cid}", "${cid}y", "${action}"]), min_size=1, max_size=3)
DOWNSTREAM = st.lists(st.sampled_from(["a", "b", "${cid}", "x${cid}", "+", "#"]), min_size=1, max_size=3)


@settings(PATIENT, max_examples=500)
@given(st.lists(UPSTREAM.map("/".join), min_size=2, max_size=2, unique=True), DOWNSTREAM.map("/".join))
def test_whatever_the_templates_no_identity_reaches_the_topics_of_another_one(texts, filter_text):
    first, second = templates = [parse(text) for text in texts]
    try:
        downstream = parse_filter(filter_text)
        reserved_ = reserved_identities({"first": first, "second": second}, downstream)
    except TemplateError:
        return  # refused at start
    identities = [word for word in WORDS if word not in reserved_]

    def topics(template: TopicTemplate, cid: str) -> set[str]:
        return {template.render({"cid": cid, "action": action}) for action in WORDS}

    if "cid" in first.names & second.names:
        for one, other in product(identities, repeat=2):
            assert one == other or not topics(first, one) & topics(second, other)
    if "cid" in downstream.names:
        for template, cid in product(templates, identities):
            for topic in topics(template, cid):
                brought = downstream.match(topic)
                assert brought is None or brought["cid"] in reserved_
