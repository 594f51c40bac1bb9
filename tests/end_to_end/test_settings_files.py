"""Settings files in the daemon's hands (contract, section 8): TOML, and EMQX 4.4's emqx_ocpp.conf."""

from pathlib import Path

import pytest
from processes import START_LIMIT, free_port, gateway, mosquitto

from end_to_end.wire import ChargePoint, Service, ask, assert_calm, request, set_up

EVERYTHING = """
node = "gw-1"
mountpoint = "site 1/"
payload_format = "array"
drain_seconds = "5s"
[[listener]]
endpoint = "{endpoint}"
path = "/ocpp/1.6/"
no_subprotocol = "ocpp1.6"
[upstream]
topic = "up/${clientid}/${version}/${type}/${action}/${id}"
reply_topic = "up/${username}-answers"
error_topic = "up/${node}/errors/x${cid}x"
invalid_topic = ""
qos = 0
[upstream.topic_override_mapping]
BootNotification = "boot/${cid}/${action}"
[dnstream]
topic = "down/x${cid}x/#"
strit_mode = false
max_mqueue_len = 3
call_timeout = "5m"
[mqtt]
client_id = "mine"
keepalive = 60
[limits]
message_size = 2048
"""


def test_every_setting_of_a_toml_file_is_obeyed(tmp_path: Path) -> None:
    with set_up(tmp_path, "mosquitto 5", EVERYTHING) as stage:
        stage.gateway.wait_for("node gw-1$")
        stage.gateway.wait_for(r"subscribe to site 1/up/\S+/\+/\+/\+/\+, .* publish to site 1/down/")
        service = stage.service
        with ChargePoint(stage.port, "a/b", path="/ocpp/1.6") as charge_point:
            charge_point.socket.send('[2, "id/1",  "Heartbeat", {}]')
            call = service.take("site 1/up/a%2Fb/ocpp1.6/2/Heartbeat/id%2F1")
            # The array as it came, white space and all.
            assert call.payload == b'[2, "id/1",  "Heartbeat", {}]'
            assert call.properties is not None
            assert call.properties.ResponseTopic == "site 1/down/xa%2Fbx/Reply"
            charge_point.socket.send("not JSON: nothing is published of it")
            charge_point.send(2, "2", "BootNotification", {})
            service.take("site 1/boot/a%2Fb/BootNotification")
            assert not service.left("")

            # Without strict mode CALLs do not wait for each other, until max_mqueue_len are unanswered.
            for number in range(8):
                service.publish("site 1/down/xa%2Fbx/any/depth", f'[2, "c-{number}", "Reset", {{}}]')
            assert [charge_point.receive()[1] for _ in range(3)] == ["c-0", "c-1", "c-2"]
            charge_point.send(3, "c-1", {"status": "Accepted"})
            assert service.take("site 1/up/a%2Fb-answers").content == [3, "c-1", {"status": "Accepted"}]
            assert charge_point.receive()[1] == "c-3"
            errors = [service.take("site 1/up/gw-1/errors/xa%2Fbx").content for _ in range(2)]
            assert [(kind, unique_id, code) for kind, unique_id, code, *_ in errors] == [
                (4, "c-6", "GenericError"),
                (4, "c-7", "GenericError"),
            ]
            assert {details["reason"] for *_, details in errors} == {"queue_full"}

            charge_point.send(2, "3", "DataTransfer", {"data": "x" * 2048})
            assert charge_point.close_code()[0] == 1009
        assert ask(stage.port, request("/ocpp/1.6/CP1", offered=[])).status == 101


EMQX = """
## As EMQX 4.4 has it
ocpp.listener.ws = 0.0.0.0:33033
ocpp.upstream.topic = old/cp/${cid}/${action}
ocpp.upstream.topic.BootNotification = old/cp/${cid}/Notify/${action}
ocpp.upstream.reply_topic = old/cp/Reply/${cid}
ocpp.upstream.error_topic = old/cp/Error/${cid}
ocpp.dnstream.topic = old/cs/${clientid}/+/+
ocpp.dnstream.strit_mode = false
ocpp.dnstream.max_mqueue_len = 10
"""


def test_a_file_of_emqx_4_4_is_obeyed(tmp_path: Path) -> None:
    port, file = free_port(), tmp_path / "emqx_ocpp.conf"
    file.write_text(EMQX, encoding="utf-8")
    with mosquitto(tmp_path) as broker, Service(broker.port) as service:
        endpoint = f"tcp:{port}:interface=127.0.0.1"
        arguments = ["--ws", endpoint, "--config", str(file), "--mqtt", f"mqtt://127.0.0.1:{broker.port}"]
        with gateway(*arguments) as running:
            running.wait_for("not used here: ocpp.listener.ws", START_LIMIT)
            running.wait_for("connected to broker")
            with ChargePoint(port, "CP1") as charge_point:
                charge_point.send(2, "1", "BootNotification", {})
                assert service.take("old/cp/CP1/Notify/BootNotification").content["Action"] == "BootNotification"
                charge_point.send(2, "2", "Heartbeat", {})
                service.take("old/cp/CP1/Heartbeat")
                for unique_id in ("c-1", "c-2"):
                    service.publish("old/cs/CP1/x/y", f'[2, "{unique_id}", "Reset", {{}}]')
                assert [charge_point.receive()[1] for _ in range(2)] == ["c-1", "c-2"]
                charge_point.send(3, "c-2", {})
                assert service.take("old/cp/Reply/CP1").content["UniqueId"] == "c-2"
                charge_point.send(4, "c-1", "NotSupported")
                assert service.take("old/cp/Error/CP1").content["Action"] == "Reset"
            assert ask(port, request("/ocpp/Reply")).status == 404
    assert_calm(running)


@pytest.mark.parametrize("repeated", [1, 2])
def test_the_command_line_wins_over_the_file(tmp_path: Path, repeated: int) -> None:
    in_file, ports = free_port(), [free_port() for _ in range(repeated)]
    file = tmp_path / "ocppgw.toml"
    file.write_text(
        f"""
        node = "from-file"
        [mqtt]
        url = "mqtt://127.0.0.1:9"
        [auth]
        checkers = ["htpasswd:/nowhere"]
        [[listener]]
        endpoint = "tcp:{in_file}"
        """,
        encoding="utf-8",
    )
    listeners = [argument for port in ports for argument in ("--ws", f"tcp:{port}:interface=127.0.0.1")]
    options = ["--mqtt", f"embedded:{free_port()}", "--node", "from-line", "--auth", "anonymous"]
    with gateway("-c", str(file), *listeners, *options) as running:
        running.wait_for("connected to broker", START_LIMIT)
        running.wait_for("node from-line$")
        told = [line for line in running.lines if "charge points connect" in line]
        assert len(told) == repeated
        for port in ports:
            assert ask(port, request("/ocpp/CP1")).status == 101
    assert_calm(running)
