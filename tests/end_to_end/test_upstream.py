"""From charge points to MQTT (contract of topics and payloads, upstream), with each kind of broker."""

import pytest

from end_to_end.wire import ChargePoint, Stage, exactly, masked, silent_charge_point

# With such an action or identity, and how it stands in a topic (contract, section 3), a careless gateway would speak
# on somebody else's topic, or be thrown out by its broker: mosquitto closes the connection for control characters and
# non-characters (MQTT 5, 1.5.4).
ODD = {
    "a/b": "a%2Fb",
    "+/#": "%2B%2F%23",
    "../x": "..%2Fx",
    "50%": "50%25",
    "%2F": "%252F",
    "$SYS": "%24SYS",
    "$share/g/#": "%24share%2Fg%2F%23",
    "a$b": "a$b",
    "a b": "a b",
    "a:b|c": "a:b|c",
    "Größe ²": "Größe ²",
    "🔌": "🔌",
    "\x00": "%00",
    "\x1f": "%1F",
    "\x7f": "%7F",
    "\x9f": "%C2%9F",
    "\ufdd0": "%EF%B7%90",
    "\uffff": "%EF%BF%BF",
    "\U0001fffe": "%F0%9F%BF%BE",
}

VALUES = (
    '{"z":1,"a":1.0,"big":123456789012345678901234567890,"fine":0.1234567890123456789,"huge":1e400,"tiny":-1E-400,'
    '"lone":"\\ud800","text":"\\u0000 \\ud83d\\udd0c ä","key \\udfff":null,"deep":[[[{"b":true,"a":[]}]]]}'
)


def test_a_call_is_published_in_the_object_form(stage: Stage, cid: str) -> None:
    with ChargePoint(stage.port, cid) as charge_point:
        charge_point.socket.send('[2, "19223201", "BootNotification", {"chargePointVendor": "v", "b": "ü", "a": 1.0}]')
        assert stage.service.take(f"ocpp/cp/{cid}/BootNotification").payload.decode() == (
            '{"MessageTypeId":2,"UniqueId":"19223201","Action":"BootNotification",'
            '"Payload":{"chargePointVendor":"v","b":"ü","a":1.0}}'
        )


@pytest.mark.parametrize(
    ("answer", "topic", "rest"),
    [
        ([3, "c-1", {"status": "Accepted"}], "Reply", {"Payload": {"status": "Accepted"}}),
        (
            [4, "c-1", "NotSupported", "not now", {"a": 1}],
            "Error",
            {"ErrorCode": "NotSupported", "ErrorDescription": "not now", "ErrorDetails": {"a": 1}},
        ),
        # Charge points leave out what the specification demands (OCPP-J 1.6, 4.2.3).
        (
            [4, "c-1", "NotSupported"],
            "Error",
            {"ErrorCode": "NotSupported", "ErrorDescription": "", "ErrorDetails": {}},
        ),
    ],
)
def test_an_answer_carries_the_action_of_its_call(
    stage: Stage, cid: str, answer: list[object], topic: str, rest: dict[str, object]
) -> None:
    with stage.online(cid) as charge_point:
        stage.service.send(cid, [2, "c-1", "Reset", {"type": "Soft"}])
        assert charge_point.receive() == [2, "c-1", "Reset", {"type": "Soft"}]
        charge_point.send(*answer)
        content = stage.service.take(f"ocpp/cp/{topic}/{cid}").content
        assert content == {"MessageTypeId": answer[0], "UniqueId": "c-1", "Action": "Reset", **rest}
        # The same answer again answers nothing: it is published all the same, without an action.
        charge_point.send(*answer)
        content = stage.service.take(f"ocpp/cp/{topic}/{cid}").content
        assert content == {"MessageTypeId": answer[0], "UniqueId": "c-1", **rest}


def test_the_messages_of_ocpp_2_1_are_published(stage: Stage, cid: str) -> None:
    with ChargePoint(stage.port, cid, "ocpp2.1") as charge_point:
        charge_point.send(6, "s-1", "NotifyPeriodicEventStream", {"id": 7})
        assert stage.service.take(f"ocpp/cp/{cid}/NotifyPeriodicEventStream").content == {
            "MessageTypeId": 6,
            "UniqueId": "s-1",
            "Action": "NotifyPeriodicEventStream",
            "Payload": {"id": 7},
        }
        charge_point.send(5, "r-1", "FormatViolation", "", {})
        assert stage.service.take(f"ocpp/cp/Error/{cid}").content == {
            "MessageTypeId": 5,
            "UniqueId": "r-1",
            "ErrorCode": "FormatViolation",
            "ErrorDescription": "",
            "ErrorDetails": {},
        }


def test_messages_arrive_complete_and_in_order(stage: Stage, cid: str) -> None:
    with ChargePoint(stage.port, cid) as charge_point:
        for number in range(500):
            charge_point.send(2, str(number), "MeterValues", {})
        ids = [stage.service.take(f"ocpp/cp/{cid}/MeterValues").content["UniqueId"] for _ in range(500)]
        assert ids == [str(number) for number in range(500)]


def test_what_a_charge_point_said_before_it_vanished_is_published(stage: Stage, cid: str) -> None:
    with silent_charge_point(stage.port, cid) as charge_point:
        charge_point.sendall(masked(b'[2,"1","StopTransaction",{}]') + masked(b'[2,"2","StatusNotification",{}]'))
    assert stage.service.take(f"ocpp/cp/{cid}/StopTransaction").content["UniqueId"] == "1"
    assert stage.service.take(f"ocpp/cp/{cid}/StatusNotification").content["UniqueId"] == "2"


def test_values_survive(stage: Stage, cid: str) -> None:
    with stage.online(cid) as charge_point:
        charge_point.socket.send(f'[2,"1","DataTransfer",{VALUES}]')
        upstream = stage.service.take(f"ocpp/cp/{cid}/DataTransfer").payload
        assert dict(exactly(upstream)[1])["Payload"] == exactly(VALUES)
        stage.service.publish(f"ocpp/cs/{cid}/a/b", f'{{"MessageTypeId":3,"UniqueId":"1","Payload":{VALUES}}}')
        assert exactly(charge_point.socket.recv(10))[2] == exactly(VALUES)


def test_an_action_stays_within_its_topic_level(stage: Stage, cid: str) -> None:
    with ChargePoint(stage.port, cid) as charge_point:
        for action, level in {**ODD, "\ud800": "%ED%A0%80"}.items():
            charge_point.send(2, "1", action, {})
            assert stage.service.take(f"ocpp/cp/{cid}/{level}").content["Action"] == action
    assert not stage.service.left(cid)


def test_an_identity_stays_within_its_topic_level(stage: Stage, cid: str) -> None:
    for identity, level in ODD.items():
        with stage.online(identity + cid, level=level + cid) as charge_point:
            stage.service.send(level + cid, [2, "c-1", "Reset", {}])
            assert charge_point.receive() == [2, "c-1", "Reset", {}]
            charge_point.send(3, "c-1", {})
            stage.service.take(f"ocpp/cp/Reply/{level + cid}")
    assert not stage.service.left(cid)


def test_an_empty_action_has_a_topic(stage: Stage, cid: str) -> None:
    with ChargePoint(stage.port, cid) as charge_point:
        charge_point.send(2, "1", "", {})
        assert stage.service.take(f"ocpp/cp/{cid}/-").content["Action"] == ""


def test_mqtt_5_properties_say_what_the_message_is(stage_5: Stage) -> None:
    identity = "properties/ü 1\uffff"
    with ChargePoint(stage_5.port, identity, "ocpp2.0.1") as charge_point:
        charge_point.send(2, "id-1", "Heartbeat", {})
        properties = stage_5.service.take("ocpp/cp/properties%2Fü 1%EF%BF%BF/Heartbeat").properties
    assert properties is not None
    assert properties.ContentType == "application/json"
    assert properties.CorrelationData == b"id-1"
    user = dict(properties.UserProperty)
    # What MQTT forbids in any text is encoded there as well; a slash is not (MQTT 5, 1.5.4).
    assert user.pop("cid") == "properties/ü 1%EF%BF%BF"
    assert user.pop("version") == "ocpp2.0.1"
    assert list(user) == ["node"]


@pytest.mark.parametrize(("text", "level"), ODD.items())
def test_the_response_topic_reaches_the_charge_point(stage_5: Stage, cid: str, text: str, level: str) -> None:
    with ChargePoint(stage_5.port, text + cid) as charge_point:
        charge_point.send(2, text, text, {})
        asked = stage_5.service.take(f"ocpp/cp/{level + cid}/{level}")
        assert asked.properties is not None
        assert asked.properties.ResponseTopic == f"ocpp/cs/{level + cid}/Reply/{level}"
        stage_5.service.publish(asked.properties.ResponseTopic, '[3, "1", {"currentTime": "now"}]')
        assert charge_point.receive() == [3, "1", {"currentTime": "now"}]
