"""The gateway between sessions and topics: what services see, who is registered, and what a broker is told."""

from __future__ import annotations

from typing import Any

import pytest
from doubles import FakeBroker, FakeBrokerClient, FakeCentralSystem, FakeChargePoint, FakeRealm, delivery, settings
from twisted.cred.portal import IRealm
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from ocppgw import exactjson
from ocppgw.gateway import Gateway
from ocppgw.interfaces import IAdmission, IBroker, IBrokerClient, ICentralSystem, IChargePoint, Publication
from ocppgw.messages import MAX_READABLE_ID
from ocppgw.session import Session

CP1 = "ocpp/cs/CP1/+/+"


class Stage:
    """A gateway whose charge points, broker and clock are the test's. tables: of its settings."""

    def __init__(self, **tables: Any) -> None:
        self.clock = Clock()
        self.broker = FakeBroker()
        self.gateway = Gateway(settings(**tables), self.broker, self.clock)
        self._logouts: dict[Session, Any] = {}

    def log_in(self, identity: str = "CP1", version: str = "ocpp1.6") -> Session:
        """What cred does when a charge point has shown who it is."""
        _, session, logout = self.gateway.requestAvatar(identity.encode(), FakeChargePoint(version), ICentralSystem)
        self._logouts[session] = logout
        return session

    def connect(self, identity: str = "CP1", version: str = "ocpp1.6") -> Session:
        session = self.log_in(identity, version)
        session.opened()
        return session

    def disconnect(self, session: Session) -> None:
        self._logouts[session]()

    def deliver(self, *messages: Any, topic: str = "ocpp/cs/CP1/Request/1", **more: Any) -> None:
        self.gateway.messages_received([delivery(message, topic, **more) for message in messages])

    @property
    def last(self) -> Publication:
        return self.broker.publications[-1]


def content(publication: Publication) -> Any:
    return exactjson.loads(publication.payload)


def logged(events: list[Any], level: str) -> list[str]:
    return [event["log_format"].format(**event) for event in events if event["log_level"].name == level]


def test_the_gateway_provides_its_interfaces() -> None:
    gateway = Stage().gateway
    assert all(verifyObject(interface, gateway) for interface in (IRealm, IAdmission, IBrokerClient))


def test_the_doubles_provide_the_interfaces_that_they_stand_for() -> None:
    charge_point, realm = FakeChargePoint(), FakeRealm()
    assert verifyObject(IChargePoint, charge_point)
    assert verifyObject(ICentralSystem, FakeCentralSystem(charge_point))
    assert verifyObject(IBroker, FakeBroker())
    assert verifyObject(IBrokerClient, FakeBrokerClient())
    assert verifyObject(IRealm, realm)
    assert verifyObject(IAdmission, realm)


def test_cred_is_told_when_it_asks_for_something_else() -> None:
    with pytest.raises(NotImplementedError):
        Stage().gateway.requestAvatar(b"CP1", FakeChargePoint(), IBroker)


class TestUpstreamPublications:
    """Contract, section 3"""

    @pytest.mark.parametrize(
        ("version", "frame", "topic", "payload"),
        [
            (
                "ocpp1.6",
                b'[2, "19223201", "BootNotification", {"chargePointVendor": "v", "chargePointModel": "m"}]',
                "ocpp/cp/CP1/BootNotification",
                (
                    b'{"MessageTypeId":2,"UniqueId":"19223201","Action":"BootNotification",'
                    b'"Payload":{"chargePointVendor":"v","chargePointModel":"m"}}'
                ),
            ),
            (
                "ocpp1.6",
                b'[3,"c-1",{"status":"Accepted"}]',
                "ocpp/cp/Reply/CP1",
                b'{"MessageTypeId":3,"UniqueId":"c-1","Action":"Reset","Payload":{"status":"Accepted"}}',
            ),
            (
                "ocpp1.6",
                b'[4,"c-1","NotSupported","",{}]',
                "ocpp/cp/Error/CP1",
                (
                    b'{"MessageTypeId":4,"UniqueId":"c-1","Action":"Reset","ErrorCode":"NotSupported",'
                    b'"ErrorDescription":"","ErrorDetails":{}}'
                ),
            ),
            (
                "ocpp1.6",
                b'[4,"c-1","NotSupported"]',
                "ocpp/cp/Error/CP1",
                (
                    b'{"MessageTypeId":4,"UniqueId":"c-1","Action":"Reset","ErrorCode":"NotSupported",'
                    b'"ErrorDescription":"","ErrorDetails":{}}'
                ),
            ),
            (
                "ocpp2.1",
                b'[5,"u-1","FormatViolation","why",{"a":1}]',
                "ocpp/cp/Error/CP1",
                (
                    b'{"MessageTypeId":5,"UniqueId":"u-1","ErrorCode":"FormatViolation","ErrorDescription":"why",'
                    b'"ErrorDetails":{"a":1}}'
                ),
            ),
            (
                "ocpp2.1",
                b'[6,"s-1","NotifyPeriodicEventStream",{"id":1}]',
                "ocpp/cp/CP1/NotifyPeriodicEventStream",
                b'{"MessageTypeId":6,"UniqueId":"s-1","Action":"NotifyPeriodicEventStream","Payload":{"id":1}}',
            ),
        ],
        ids=["CALL", "CALLRESULT", "CALLERROR", "short CALLERROR", "CALLRESULTERROR", "SEND"],
    )
    def test_each_message_becomes_one_publication(self, version: str, frame: bytes, topic: str, payload: bytes) -> None:
        stage = Stage()
        session = stage.connect(version=version)
        stage.deliver([2, "c-1", "Reset", {}])
        session.frame_received(frame)
        [publication] = stage.broker.publications
        assert (publication.topic, publication.payload) == (topic, payload)
        assert (publication.qos, publication.retain) == (1, False)

    @pytest.mark.parametrize("frame", [b'[3,"c-9",{}]', b'[4,"c-9","GenericError","",{}]'])
    def test_an_answer_that_matches_no_call_has_no_action(self, frame: bytes) -> None:
        stage = Stage()
        stage.connect().frame_received(frame)
        assert "Action" not in content(stage.last)
        assert stage.gateway.counters["unmatched_answer"] == 1

    @pytest.mark.parametrize(
        "frame",
        [
            b'[2, "u-1", "DataTransfer", {"b": 1.0, "a": 12345678901234567890123, "c": 0.1000000000000000055}]',
            b'[3,"c-1",{"z":"\xc3\xa9","a":null}]',
        ],
    )
    def test_the_array_format_is_the_frame_as_it_came(self, frame: bytes) -> None:
        stage = Stage(payload_format="array")
        stage.connect().frame_received(frame)
        assert stage.last.payload == frame

    def test_a_delivery_failure_is_an_array_there_too(self) -> None:
        stage = Stage(payload_format="array")
        session = stage.connect()
        stage.deliver([2, "c-1", "Reset", {}])
        stage.disconnect(session)
        assert content(stage.last)[:3] == [4, "c-1", "GenericError"]
        assert content(stage.last)[4] == {"origin": "gateway", "reason": "disconnected"}

    def test_values_survive_the_object_format(self) -> None:
        stage = Stage()
        stage.connect().frame_received(
            '[2,"u-1","DataTransfer",{"b":98765432109876543210,"a":0.1234567890123456789,"é":"🔌"}]'.encode()
        )
        assert '"Payload":{"b":98765432109876543210,"a":0.1234567890123456789,"é":"🔌"}'.encode() in stage.last.payload

    def test_an_action_may_have_a_topic_of_its_own(self) -> None:
        stage = Stage(upstream={"topic_override_mapping": {"BootNotification": "ocpp/cp/${cid}/Notify/${action}"}})
        session = stage.connect()
        session.frame_received(b'[2,"1","BootNotification",{}]')
        session.frame_received(b'[2,"2","Heartbeat",{}]')
        assert [publication.topic for publication in stage.broker.publications] == [
            "ocpp/cp/CP1/Notify/BootNotification",
            "ocpp/cp/CP1/Heartbeat",
        ]

    def test_the_mountpoint_is_before_every_topic(self) -> None:
        stage = Stage(mountpoint="site/7/")
        session = stage.connect()
        stage.deliver([2, "c-1", "Reset", {}], topic="site/7/ocpp/cs/CP1/Request/1")
        for frame in (b'[2,"1","Heartbeat",{}]', b'[3,"c-1",{}]', b'[4,"9","GenericError","",{}]', b"rubbish"):
            session.frame_received(frame)
        assert [publication.topic for publication in stage.broker.publications] == [
            "site/7/ocpp/cp/CP1/Heartbeat",
            "site/7/ocpp/cp/Reply/CP1",
            "site/7/ocpp/cp/Error/CP1",
            "site/7/ocpp/gateway/gw-1/invalid",
        ]
        assert list(stage.broker.filters) == ["site/7/ocpp/cs/CP1/+/+"]

    @pytest.mark.parametrize(
        ("template", "topic"),
        [
            ("x/${cid}", "x/CP1"),
            ("x/${clientid}", "x/CP1"),
            ("x/${username}", "x/CP1"),
            ("x/${node}", "x/gw-1"),
            ("x/${version}", "x/ocpp1.6"),
            ("x/${type}", "x/2"),
            ("x/${id}", "x/u-1"),
            ("x/a-${action}-b", "x/a-Heartbeat-b"),
        ],
    )
    def test_placeholders_of_a_call(self, template: str, topic: str) -> None:
        stage = Stage(upstream={"topic": template})
        stage.connect().frame_received(b'[2,"u-1","Heartbeat",{}]')
        assert stage.last.topic == topic

    def test_placeholders_of_answers(self) -> None:
        stage = Stage(
            upstream={
                "reply_topic": "r/${cid}/${action}/${type}/${id}",
                "error_topic": "e/${cid}/${action}/${type}/${id}",
            }
        )
        session = stage.connect()
        stage.deliver([2, "c-1", "Reset", {}])
        session.frame_received(b'[3,"c-1",{}]')
        session.frame_received(b'[4,"c-2","GenericError","",{}]')
        assert [publication.topic for publication in stage.broker.publications] == [
            "r/CP1/Reset/3/c-1",
            "e/CP1/-/4/c-2",  # whose action is not known
        ]

    def test_what_a_peer_sends_stays_within_its_topic_level(self) -> None:
        stage = Stage(upstream={"topic": "x/${cid}/${action}/${id}"})
        stage.connect("$SYS/a+b#%").frame_received(b'[2,"../#","a/b\\u0000+",{}]')
        assert stage.last.topic == "x/%24SYS%2Fa%2Bb%23%25/a%2Fb%00%2B/..%2F%23"

    def test_qos_is_a_setting(self) -> None:
        stage = Stage(upstream={"qos": 0})
        stage.connect().frame_received(b'[2,"u-1","Heartbeat",{}]')
        assert stage.last.qos == 0


class TestMqtt5Properties:
    def test_a_message_says_what_it_is_and_where_an_answer_goes(self) -> None:
        stage = Stage()
        stage.connect(version="ocpp2.0.1").frame_received(b'[2,"u-1","Heartbeat",{}]')
        properties = stage.last.properties
        assert properties is not None
        assert properties.content_type == "application/json"
        assert properties.correlation_data == b"u-1"
        assert properties.response_topic == "ocpp/cs/CP1/Reply/Heartbeat"
        assert properties.user == (("cid", "CP1"), ("version", "ocpp2.0.1"), ("node", "gw-1"))

    @pytest.mark.parametrize(
        ("downstream", "response_topic"),
        [
            ("d/${cid}", "d/CP1"),
            ("d/${cid}/+", "d/CP1/Reply"),
            ("d/${cid}/+/+/+", "d/CP1/Reply/Heartbeat/u-1"),
            ("d/${version}/${cid}/+", "d/ocpp1.6/CP1/Reply"),
        ],
    )
    def test_the_response_topic_reaches_this_charge_point(self, downstream: str, response_topic: str) -> None:
        stage = Stage(dnstream={"topic": downstream})
        session = stage.connect()
        session.frame_received(b'[2,"u-1","Heartbeat",{}]')
        assert stage.last.properties is not None
        assert stage.last.properties.response_topic == response_topic
        stage.deliver([3, "u-1", {}], topic=response_topic)
        assert session.charge_point.frames == [[3, "u-1", {}]]

    def test_a_broker_without_mqtt_5_gets_none(self) -> None:
        stage = Stage()
        stage.broker.carries_properties = False
        stage.connect().frame_received(b'[2,"u-1","Heartbeat",{}]')
        assert stage.last.properties is None

    def test_an_identity_that_is_no_mqtt_string_is_encoded(self) -> None:
        stage = Stage()
        stage.connect("CP\x01 é/1").frame_received(b'[2,"u-1","Heartbeat",{}]')
        assert stage.last.properties is not None
        assert stage.last.properties.user[0] == ("cid", "CP%01 é/1")

    @pytest.mark.parametrize("template", ["ocpp/cp/Error/${cid}", "ocpp/cp/Error/${cid}/${action}/${id}"])
    def test_the_notice_for_an_endless_id_or_action_can_be_sent(self, template: str) -> None:
        """MQTT 5, 1.5.4 and 1.5.6: no string and no binary data has more than 65,535 bytes."""
        stage = Stage(upstream={"error_topic": template}, dnstream={"topic": "d/${cid}/+/+/+"})
        stage.connect()
        stage.deliver([2, "i" * MAX_READABLE_ID, "A" * 70_000, {}], topic="d/CP1/a/b/c")
        assert content(stage.last)["UniqueId"] == "i" * MAX_READABLE_ID
        properties = stage.last.properties
        assert properties is not None
        assert properties.response_topic is not None
        assert properties.correlation_data is not None
        sizes = [len(stage.last.topic), len(properties.response_topic), len(properties.correlation_data)]
        assert max(sizes) <= 65_535


class TestReportsOfBadFrames:
    def test_the_invalid_topic_says_who_what_and_why(self) -> None:
        stage = Stage()
        stage.connect("a/b", "ocpp2.0.1").frame_received(b'[2,"u-1",7,{}]')
        assert stage.last.topic == "ocpp/gateway/gw-1/invalid"
        assert content(stage.last) == {
            "cid": "a/b",
            "frame": '[2,"u-1",7,{}]',
            "code": "RpcFrameworkError",
            "detail": "the action is not a string",
        }

    def test_a_frame_without_an_answer_has_no_code(self) -> None:
        stage = Stage()
        stage.connect().frame_received(b"\xff\x00")
        assert content(stage.last) == {"cid": "CP1", "frame": "\ufffd\x00", "code": None, "detail": "not JSON"}
        assert stage.gateway.counters["invalid_frame"] == 1

    def test_an_empty_topic_turns_the_report_off(self) -> None:
        stage = Stage(upstream={"invalid_topic": ""})
        session = stage.connect("CP1", "ocpp2.0.1")
        session.frame_received(b"rubbish")
        assert stage.broker.publications == []
        assert session.charge_point.frames[0][2] == "RpcFrameworkError"


class TestDownstream:
    def test_a_charge_point_is_subscribed_before_its_first_message_goes_out(self) -> None:
        stage = Stage()
        stage.connect().frame_received(b'[2,"u-1","Heartbeat",{}]')
        assert stage.broker.history == [f"subscribe {CP1}", "publish ocpp/cp/CP1/Heartbeat"]
        assert stage.broker.filters == {CP1: 1}

    def test_qos_is_a_setting(self) -> None:
        stage = Stage(dnstream={"qos": 0})
        stage.connect()
        assert stage.broker.filters == {CP1: 0}

    @pytest.mark.parametrize(
        "payload",
        [
            b'[2,"c-1","Reset",{"type":"Soft"}]',
            b' \n[2,"c-1","Reset",{"type":"Soft"}]',
            b'{"MessageTypeId":2,"UniqueId":"c-1","Action":"Reset","Payload":{"type":"Soft"}}',
        ],
        ids=["array", "array behind white space", "object"],
    )
    def test_both_forms_are_understood(self, payload: bytes) -> None:
        stage = Stage()
        session = stage.connect()
        stage.deliver(payload)
        assert session.charge_point.frames == [[2, "c-1", "Reset", {"type": "Soft"}]]

    def test_the_topic_only_routes(self) -> None:
        stage = Stage()
        session = stage.connect()
        stage.deliver([3, "u-1", {}], topic="ocpp/cs/CP1/Request/Reset")
        assert session.charge_point.frames == [[3, "u-1", {}]]

    def test_each_message_goes_to_its_own_charge_point(self) -> None:
        stage = Stage()
        sessions = {identity: stage.connect(identity) for identity in ("CP1", "a/b", "$x", "é")}
        levels = {"CP1": "CP1", "a/b": "a%2Fb", "$x": "%24x", "é": "é"}
        for identity, level in levels.items():
            stage.deliver([3, identity, {}], topic=f"ocpp/cs/{level}/Reply/1")
        assert {identity: session.charge_point.frames for identity, session in sessions.items()} == {
            identity: [[3, identity, {}]] for identity in sessions
        }

    def test_a_batch_is_acknowledged_in_order_once_it_is_taken_over(self) -> None:
        stage = Stage()
        stage.connect()
        batch = [
            delivery([2, "c-1", "Reset", {}]),
            delivery(b"rubbish"),
            delivery([2, "c-2", "Reset", {}], topic="ocpp/cs/CP9/Request/1"),
            delivery([2, "c-3", "Reset", {}], retain=True),
            delivery([2, "c-4"], duplicate=True),
        ]
        stage.gateway.messages_received(batch)
        assert stage.broker.acknowledged == batch
        assert stage.broker.history[-2:] == ["publish ocpp/cp/Error/CP1", "acknowledge"]

    def test_a_retained_message_is_not_forwarded(self) -> None:
        stage = Stage()
        session = stage.connect()
        with capturedLogs() as events:
            stage.deliver([2, "c-1", "Reset", {}], retain=True)
        assert session.charge_point.frames == []
        assert stage.broker.publications == []
        assert stage.gateway.counters["retained"] == 1
        assert logged(events, "warn") == ["retained message on ocpp/cs/CP1/Request/1 is not forwarded"]

    def test_a_message_for_nobody_is_acknowledged_and_its_filter_given_up(self) -> None:
        stage = Stage()
        stage.deliver([2, "c-1", "Reset", {}], topic="ocpp/cs/CP%2F9/Request/1")
        assert stage.broker.history == ["unsubscribe ocpp/cs/CP%2F9/+/+", "acknowledge"]
        assert stage.gateway.counters["unknown_identity"] == 1

    def test_a_message_on_a_foreign_topic_is_acknowledged(self) -> None:
        stage = Stage()
        stage.deliver([2, "c-1", "Reset", {}], topic="something/else")
        assert stage.broker.history == ["acknowledge"]

    def test_a_fault_of_ours_costs_one_message_and_not_the_batch(self) -> None:
        stage = Stage()
        session = stage.connect()

        def broken(frame: bytes) -> bool:
            session.charge_point.send = working
            raise ZeroDivisionError

        working, session.charge_point.send = session.charge_point.send, broken
        with capturedLogs() as events:
            stage.deliver([3, "u-1", {}], [3, "u-2", {}])
        assert session.charge_point.frames == [[3, "u-2", {}]]
        assert len(stage.broker.acknowledged) == 2
        assert [event["log_failure"].type for event in events if "log_failure" in event] == [ZeroDivisionError]

    def test_a_refused_subscription_is_said(self) -> None:
        stage = Stage()
        stage.connect()
        with capturedLogs() as events:
            stage.broker.refuse(CP1)
        assert stage.gateway.counters["subscription_refused"] == 1
        [line] = logged(events, "error")
        assert CP1 in line
        assert "CP1" in line


class TestOneIdentityTwice:
    def test_the_newest_connection_stays(self) -> None:
        stage = Stage()
        old = stage.connect()
        new = stage.connect()
        assert old.charge_point.closed == (4001, "replaced")
        assert new.charge_point.closed is None
        stage.deliver([2, "c-1", "Reset", {}])
        assert (old.charge_point.frames, new.charge_point.frames) == ([], [[2, "c-1", "Reset", {}]])

    def test_the_calls_of_the_old_one_end_as_replaced(self) -> None:
        stage = Stage()
        stage.connect()
        stage.deliver([2, "c-1", "Reset", {}], [2, "c-2", "Reset", {}])
        stage.connect()
        assert [
            (content(it)["UniqueId"], content(it)["ErrorDetails"]["reason"]) for it in stage.broker.publications
        ] == [
            ("c-1", "replaced"),
            ("c-2", "replaced"),
        ]

    def test_the_filter_stays_subscribed_through_the_late_close(self) -> None:
        stage = Stage()
        old = stage.connect()
        new = stage.connect()
        stage.disconnect(old)
        assert stage.broker.history == [f"subscribe {CP1}"]
        assert stage.gateway.sessions == {"CP1": new}
        stage.deliver([2, "c-1", "Reset", {}])
        stage.disconnect(old)
        assert new.charge_point.frames == [[2, "c-1", "Reset", {}]]
        assert stage.broker.publications == []

    def test_a_login_alone_replaces_nobody(self) -> None:
        """Its handshake may still fail."""
        stage = Stage()
        old = stage.connect()
        new = stage.log_in()
        assert stage.gateway.sessions == {"CP1": old}
        stage.disconnect(new)
        assert stage.gateway.sessions == {"CP1": old}
        assert stage.broker.filters == {CP1: 1}
        assert old.charge_point.closed is None

    def test_another_version_may_need_another_filter(self) -> None:
        stage = Stage(dnstream={"topic": "ocpp/${version}/${cid}"})
        stage.connect(version="ocpp1.6")
        stage.connect(version="ocpp2.0.1")
        assert stage.broker.filters == {"ocpp/ocpp2.0.1/CP1": 1}

    def test_the_last_one_takes_everything_with_it(self) -> None:
        stage = Stage()
        old, new = stage.connect(), stage.connect()
        stage.disconnect(new)
        stage.disconnect(old)
        assert stage.gateway.sessions == {}
        assert stage.broker.filters == {}

    def test_a_call_of_the_old_one_is_left_to_its_sender(self) -> None:
        # The answer would go to the new one, which has not asked; a CALL without an answer is sent again.
        stage = Stage()
        old = stage.connect()
        stage.connect()
        old.frame_received(b'[2,"u-1","StopTransaction",{}]')
        assert stage.broker.publications == []
        assert stage.gateway.counters["call_after_end"] == 1

    def test_an_answer_of_the_old_one_is_late(self) -> None:
        stage = Stage()
        old = stage.connect()
        stage.deliver([2, "c-1", "Reset", {}])
        stage.connect()
        old.frame_received(b'[3,"c-1",{"status":"Accepted"}]')
        assert stage.last.topic == "ocpp/cp/Reply/CP1"
        assert content(stage.last)["Action"] == "Reset"
        assert content(stage.last)["Late"] is True


class TestCongestion:
    def test_reading_pauses_and_resumes(self) -> None:
        stage = Stage()
        sessions = [stage.connect("CP1"), stage.connect("CP2")]
        stage.gateway.broker_congested()
        assert [session.charge_point.reading for session in sessions] == [False, False]
        stage.gateway.broker_relieved()
        assert [session.charge_point.reading for session in sessions] == [True, True]

    def test_whoever_connects_meanwhile_pauses_too(self) -> None:
        stage = Stage()
        stage.gateway.broker_congested()
        session = stage.connect()
        assert not session.charge_point.reading
        stage.gateway.broker_relieved()
        assert session.charge_point.reading
        assert stage.connect("CP2").charge_point.reading

    def test_commands_go_on(self) -> None:
        stage = Stage()
        session = stage.connect()
        stage.gateway.broker_congested()
        stage.deliver([2, "c-1", "Reset", {}])
        assert session.charge_point.frames == [[2, "c-1", "Reset", {}]]


class TestAdmission:
    def test_an_ordinary_identity_may_connect(self) -> None:
        assert Stage().gateway.refusal("CP1") is None

    @pytest.mark.parametrize("identity", ["Reply", "Error", "Status"])
    def test_an_identity_that_would_speak_on_a_topic_of_others_may_not(self, identity: str) -> None:
        gateway = Stage().gateway
        assert gateway.refusal(identity) == "reserved"
        assert gateway.refusal(identity.lower()) is None

    def test_the_reserved_words_come_from_the_templates(self) -> None:
        gateway = Stage(upstream={"reply_topic": "ocpp/cp/Answer/${cid}"}).gateway
        assert gateway.refusal("Answer") == "reserved"
        assert gateway.refusal("Reply") is None

    def test_a_broker_may_be_away_for_a_while(self) -> None:
        stage = Stage(mqtt={"outage_grace": 10})
        stage.clock.advance(100)
        stage.broker.away_since = 100.0
        stage.clock.advance(9.9)
        assert stage.gateway.refusal("CP1") is None
        stage.clock.advance(0.1)
        assert stage.gateway.refusal("CP1") == "broker away"
        stage.broker.away_since = None
        assert stage.gateway.refusal("CP1") is None

    def test_who_is_connected_stays_while_the_broker_is_away(self) -> None:
        stage = Stage()
        session = stage.connect()
        stage.gateway.broker_lost("gone")
        stage.clock.advance(3600)
        stage.gateway.broker_connected()
        assert session.charge_point.closed is None
        assert stage.gateway.sessions == {"CP1": session}


class StopTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.stage = Stage(drain_seconds=10)
        self.stage.gateway.startService()

    def test_every_charge_point_is_told_and_waited_for(self) -> None:
        sessions = [self.stage.connect("CP1"), self.stage.connect("CP2")]
        stopped = self.stage.gateway.stopService()
        assert [session.charge_point.closed[0] for session in sessions] == [1001, 1001]
        self.stage.disconnect(sessions[0])
        self.assertNoResult(stopped)
        self.stage.disconnect(sessions[1])
        self.successResultOf(stopped)
        assert self.stage.broker.filters == {}
        assert self.stage.clock.getDelayedCalls() == []

    def test_open_calls_end_as_shutting_down(self) -> None:
        session = self.stage.connect()
        self.stage.deliver([2, "c-1", "Reset", {}], [2, "c-2", "Reset", {}])
        self.stage.gateway.stopService()
        self.stage.disconnect(session)
        self.stage.deliver([2, "c-3", "Reset", {}])
        reasons = [content(publication)["ErrorDetails"]["reason"] for publication in self.stage.broker.publications]
        assert reasons == ["shutting_down"] * 3

    def test_a_call_that_comes_while_the_sockets_close_fails(self) -> None:
        self.stage.connect()
        self.stage.gateway.stopService()
        self.stage.deliver([2, "c-1", "Reset", {}])
        assert content(self.stage.last)["ErrorDetails"]["reason"] == "shutting_down"

    def test_it_ends_within_drain_seconds(self) -> None:
        session = self.stage.connect()
        stopped = self.stage.gateway.stopService()
        self.stage.clock.advance(9.9)
        self.assertNoResult(stopped)
        self.stage.clock.advance(0.1)
        self.successResultOf(stopped)
        self.stage.disconnect(session)
        assert self.stage.gateway.sessions == {}

    def test_without_charge_points_it_ends_at_once(self) -> None:
        self.successResultOf(self.stage.gateway.stopService())

    def test_nobody_new_comes_in(self) -> None:
        self.stage.gateway.stopService()
        assert self.stage.gateway.refusal("CP1") == "broker away"

    def test_whoever_was_logging_in_is_sent_away(self) -> None:
        session = self.stage.log_in()
        self.successResultOf(self.stage.gateway.stopService())
        session.opened()
        assert session.charge_point.closed[0] == 1001
        assert self.stage.broker.filters == {}
        assert self.stage.gateway.sessions == {}
        self.stage.disconnect(session)
        assert self.stage.broker.history == []


class TestSettingsOfOneChargePoint:
    def test_they_hold_for_those_that_match(self) -> None:
        sections = [{"match": "WB-*", "call_timeout": 60, "max_outgoing_size": 50}]
        stage = Stage(charge_point=sections)
        other, special = stage.connect("CP1"), stage.connect("WB-1")
        for session in (other, special):
            session.message_received(delivery([2, "c-1", "Reset", {}]))
        stage.clock.advance(30)
        assert [publication.topic for publication in stage.broker.publications] == ["ocpp/cp/Error/CP1"]
        stage.clock.advance(30)
        assert stage.broker.publications[-1].topic == "ocpp/cp/Error/WB-1"
        special.message_received(delivery([2, "c-2", "DataTransfer", {"data": "x" * 50}]))
        assert exactjson.loads(stage.broker.publications[-1].payload)["ErrorDetails"]["reason"] == "too_large"


class TestMessagesUnderWay:
    """What a service sent just before its charge point went away has its end, too."""

    def test_a_call_gets_its_notice(self) -> None:
        stage = Stage()
        stage.disconnect(stage.connect())
        stage.deliver([2, "c-1", "Reset", {}])
        assert content(stage.last)["ErrorDetails"]["reason"] == "disconnected"

    def test_after_a_while_nobody_remembers(self) -> None:
        stage = Stage()
        stage.disconnect(stage.connect())
        stage.clock.advance(10)
        stage.deliver([2, "c-1", "Reset", {}])
        assert stage.broker.publications == []
        assert stage.gateway.counters["unknown_identity"] == 1

    def test_strays_are_logged_once_a_minute(self) -> None:
        stage = Stage()
        with capturedLogs() as events:
            for _ in range(50):
                stage.deliver([2, "c-1", "Reset", {}])
        assert len(events) == 1
        assert stage.gateway.counters["unknown_identity"] == 50


def test_a_message_without_end_is_not_even_read() -> None:
    stage = Stage()
    stage.connect()
    stage.deliver(b"[" * 3_000_000)
    assert stage.gateway.counters["too_large_to_read"] == 1
    assert len(stage.broker.acknowledged) == 1


def test_a_call_that_the_broker_delivers_again_is_not_written_again() -> None:
    # MQTT 5, 4.4: without our acknowledgement it has to.
    stage = Stage()
    session = stage.connect()
    again = delivery([2, "c-1", "Reset", {}], duplicate=True)
    stage.gateway.messages_received([delivery([2, "c-1", "Reset", {}]), again])
    session.frame_received(b'[3,"c-1",{}]')
    stage.gateway.messages_received([again])
    assert [frame[1] for frame in session.charge_point.frames] == ["c-1"]
    assert stage.gateway.counters["delivered_again"] == 2


def test_a_first_delivery_with_the_mark_of_a_second_one_is_written() -> None:
    stage = Stage()
    session = stage.connect()
    stage.gateway.messages_received([delivery([2, "c-1", "Reset", {}], duplicate=True)])
    assert [frame[1] for frame in session.charge_point.frames] == ["c-1"]
