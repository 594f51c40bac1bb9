"""permessage-deflate (RFC 7692): 2.x has it (Part 4, 3.4), 1.6 only where the operator says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.sync.client import ClientConnection, connect

from end_to_end.wire import LIMIT, Stage, set_up


def compressing(port: int, cid: str, version: str, **parameters: object) -> ClientConnection:
    return connect(
        f"ws://127.0.0.1:{port}/ocpp/{cid}",
        subprotocols=[version],  # type: ignore[list-item]
        extensions=[ClientPerMessageDeflateFactory(**parameters)],  # type: ignore[arg-type]
        open_timeout=LIMIT,
        max_size=None,
        proxy=None,
    )


@pytest.mark.parametrize("version", ["ocpp2.0.1", "ocpp2.1"])
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"client_max_window_bits": True},
        {"server_max_window_bits": 9, "client_max_window_bits": 9},
        {"server_no_context_takeover": True, "client_no_context_takeover": True},
    ],
    ids=["plain", "window", "small windows", "no context"],
)
def test_2x_compresses_both_ways(stage_5: Stage, cid: str, version: str, parameters: dict[str, object]) -> None:
    with compressing(stage_5.port, cid, version, **parameters) as socket:
        assert len(socket.protocol.extensions) == 1
        for number in range(3):
            socket.send(json.dumps([2, f"{number}", "Heartbeat", {"customData": {"vendorId": "v" * 5000}}]))
            assert stage_5.service.take(f"ocpp/cp/{cid}/Heartbeat").content["UniqueId"] == f"{number}"
            stage_5.service.send(cid, [3, f"{number}", {"currentTime": "t" * 5000}])
            assert json.loads(socket.recv(LIMIT)) == [3, f"{number}", {"currentTime": "t" * 5000}]


def test_16_does_not_unless_told_to(stage_5: Stage, cid: str, tmp_path: Path) -> None:
    with compressing(stage_5.port, cid, "ocpp1.6") as socket:
        assert socket.protocol.extensions == []
    listener = '[[listener]]\nendpoint = "{endpoint}"\ncompression = "all"\n'
    with set_up(tmp_path, "embedded 3.1.1", listener) as stage, compressing(stage.port, cid, "ocpp1.6") as socket:
        assert len(socket.protocol.extensions) == 1


def test_what_inflates_beyond_the_limit_closes_the_connection(stage_5: Stage, cid: str) -> None:
    with compressing(stage_5.port, cid, "ocpp2.0.1") as socket, stage_5.online(f"{cid}-other") as other:
        socket.send("[" + " " * 100_000_000 + "]")
        with pytest.raises(Exception, match="1009"):
            socket.recv(LIMIT)
        other.send(2, "2", "Heartbeat", {})
        assert stage_5.service.take(f"ocpp/cp/{cid}-other/Heartbeat").content["UniqueId"] == "2"
