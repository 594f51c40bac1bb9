"""The embedded broker's process: rumqttd, by way of iotcore, on one address, until its standard input ends.

Run by embedded.py as a file: `python -P rumqttd.py HOST PORT MAX_PAYLOAD_SIZE`. It imports nothing of ours, nor
Twisted, which would double its memory. Ctrl-C in a terminal and SIGTERM to a control group reach it, too, and are for
the gateway alone, which has messages to hand in before the broker goes: only the end of its standard input ends it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading

# rumqttd keeps one log for each topic filter that was ever subscribed, also of what was read, and drops its oldest
# segment in silence when there are more than max_segment_count. Thus a subscriber may be 28 MiB behind, some 80,000
# OCPP messages, before it loses any; and a busy filter costs 32 MiB of payload, 55 MiB of memory (rumqttd's own example
# allows 1 GiB). A message larger than a segment fits all the same: a segment is closed after the message that fills it.
# max_outgoing_packet_count is also how many retained messages a subscription with QoS 0 gets; with QoS 1 it is 100, as
# many as a subscriber may leave unacknowledged, a constant of rumqttd. max_inflight_count only bounds how many packets
# are taken from one socket at a time.
SETTINGS = """
id = 0
[router]
id = 0
max_connections = 10010
max_outgoing_packet_count = 10000
max_segment_size = 4194304
max_segment_count = 8
[v4.1]
name = "ocppgw"
listen = "{host}:{port}"
next_connection_delay_ms = 1
[v4.1.connections]
connection_timeout_ms = 60000
max_payload_size = {max_payload_size}
max_inflight_count = 1000
"""


def main(host: str, port: int, max_payload_size: int) -> None:  # pragma: no cover - in its own process
    """Be the broker. max_payload_size: bytes of one MQTT packet; the connection of a larger one is closed."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import iotcore

    # At any lower level rumqttd says something about each packet, as errors too.
    logging.getLogger("rumqttd").setLevel(logging.CRITICAL)
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:  # mode 0600; read once, by the constructor
        file.write(SETTINGS.format(host=host, port=port, max_payload_size=max_payload_size))
        file.flush()
        broker = iotcore.Broker(config_path=file.name)
    broker.run_forever()


def _end_with_parent() -> None:  # pragma: no cover - in its own process
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":  # pragma: no cover - in its own process
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
