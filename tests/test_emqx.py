"""emqx_ocpp.conf of EMQX 4.4, as its manual has it."""

from __future__ import annotations

import pytest

from ocppgw.config import load
from ocppgw.emqx import read
from ocppgw.settings import SettingsError

MANUAL = """\
## plugins/emqx_ocpp.conf
##
## OCPP gateway will publish all Charge Point messages to this topic.
ocpp.upstream.topic = ocpp/cp/${cid}/${action}

## Supports overriding the default topic by message name
ocpp.upstream.topic.BootNotification = ocpp/cp/${cid}/Notify/${action}
ocpp.upstream.topic.12 = ocpp/12/${cid}
  ocpp.upstream.reply_topic=ocpp/cp/Reply/${cid}
ocpp.upstream.error_topic   =   ocpp/cp/Error/${cid}

# The topic to receive messages from third-party services
ocpp.dnstream.topic = ocpp/${cid}/+/+
ocpp.dnstream.strit_mode = false
ocpp.dnstream.max_mqueue_len = 10

ocpp.upstream.awaiting_timeout = 30s
ocpp.upstream.awaiting_timeout = 31s
listener.ocpp.tcp.external = 33033
listener.ocpp.tcp.external = 33034
"""


def test_the_file_of_the_manual():
    table, notices = read(MANUAL, "emqx_ocpp.conf")
    assert table == {
        "upstream": {
            "topic": "ocpp/cp/${cid}/${action}",
            "topic_override_mapping": {
                "BootNotification": "ocpp/cp/${cid}/Notify/${action}",
                "12": "ocpp/12/${cid}",
            },
            "reply_topic": "ocpp/cp/Reply/${cid}",
            "error_topic": "ocpp/cp/Error/${cid}",
            "awaiting_timeout": "31s",
        },
        "dnstream": {"topic": "ocpp/${cid}/+/+", "strict_mode": False, "max_mqueue_len": 10},
    }
    assert notices == ("emqx_ocpp.conf: not used here: listener.ocpp.tcp.external",)


def test_settings_come_of_it(tmp_path):
    file = tmp_path / "emqx_ocpp.conf"
    file.write_text(MANUAL, encoding="utf-8")
    settings = load(str(file))
    assert settings.topics.overrides["BootNotification"].text == "ocpp/cp/${cid}/Notify/${action}"
    assert settings.topics.downstream.text == "ocpp/${cid}/+/+"
    assert settings.topics.reserved == {"Reply", "Error", "Status", "cp", "gateway"}
    assert settings.dnstream.strict_mode is False
    assert settings.dnstream.max_mqueue_len == 10
    assert [notice.split(": ", 1)[1] for notice in settings.notices] == ["not used here: listener.ocpp.tcp.external"]


def test_a_file_whose_keys_are_all_used_has_no_notice():
    assert read("ocpp.dnstream.topic = a/${cid}\r\n", "x.conf")[1] == ()


def test_an_unknown_key_is_named_without_its_value():
    _, notices = read("auth.user.password = hunter2\n", "x.conf")
    assert notices == ("x.conf: not used here: auth.user.password",)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ocpp", "line 1: must be KEY = VALUE"),
        ("\n\nocpp.dnstream.topic a/${cid}", "line 3: must be KEY = VALUE"),
        ("= a", "line 1: must be KEY = VALUE"),
        ("a b = c", "line 1: must be KEY = VALUE"),
        ("ocpp.dnstream.topic =", "dnstream.topic = '': is empty"),
        ("ocpp.dnstream.topic = a/${cid} # x", "dnstream.topic = 'a/${cid} # x': may not have a wildcard here"),
        ("ocpp.upstream.topic = 5", "upstream.topic = 5: must be a text"),
        (
            "ocpp.dnstream.max_mqueue_len = 9k",
            "dnstream.max_mqueue_len = '9k': must be a whole number from 1 to 100000",
        ),
        ("ocpp.dnstream.strit_mode = on", "dnstream.strict_mode = 'on': must be true or false"),
    ],
)
def test_a_faulty_line_is_told_in_one(tmp_path, text, problem):
    file = tmp_path / "emqx_ocpp.conf"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        load(str(file))
    assert str(caught.value) == f"{file}: {problem}"


def test_a_key_that_emqx_does_not_have_is_no_notice():
    with pytest.raises(SettingsError, match=r"line 2: ocpp.upstream.reply_topik: unknown key; known are "):
        read("##\nocpp.upstream.reply_topik = x\n", "emqx_ocpp.conf")
