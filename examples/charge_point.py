"""A small OCPP 1.6 charge point: it boots, charges for a moment, and answers what it is told, e.g. Reset.

    python charge_point.py CP1
    python charge_point.py CP1 --url ws://127.0.0.1:33033/ocpp --password KEY

Needs `pip install ocpp websockets`. It knows nothing of ocppgw: any OCPP 1.6 central system will do.
"""

import argparse
import asyncio
import base64
import contextlib
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import websockets
from ocpp.routing import on
from ocpp.v16 import ChargePoint as ChargePoint16
from ocpp.v16 import call, call_result
from ocpp.v16.enums import Action


def now() -> str:
    """Return the time as OCPP writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class ChargePoint(ChargePoint16):
    """One connector, nothing on it."""

    @on(Action.reset)
    def reset(self, type: str) -> call_result.Reset:  # noqa: A002 - OCPP's name
        """Pretend to restart."""
        print(f"told to Reset ({type})")
        return call_result.Reset(status="Accepted")

    @on(Action.remote_start_transaction)
    def remote_start(self, **request: Any) -> call_result.RemoteStartTransaction:
        """Pretend to start charging."""
        print(f"told to RemoteStartTransaction: {request}")
        return call_result.RemoteStartTransaction(status="Accepted")

    async def ask(self, request: Any) -> Any:
        """Send a CALL and print what comes back."""
        answer = await self.call(request, suppress=False)
        print(f"{type(request).__name__}: {answer}")
        return answer

    async def charge(self) -> None:
        """Go through a short charging session, then keep in touch."""
        boot = await self.ask(call.BootNotification(charge_point_model="Demo", charge_point_vendor="ocppgw"))
        await self.ask(call.StatusNotification(connector_id=1, error_code="NoError", status="Available"))
        await self.ask(call.Authorize(id_tag="04A2B3C4"))
        started = await self.ask(
            call.StartTransaction(connector_id=1, id_tag="04A2B3C4", meter_start=1000, timestamp=now())
        )
        values = [{"timestamp": now(), "sampled_value": [{"value": "1250", "unit": "Wh"}]}]
        await self.ask(call.MeterValues(connector_id=1, transaction_id=started.transaction_id, meter_value=values))
        await self.ask(call.StopTransaction(transaction_id=started.transaction_id, meter_stop=1250, timestamp=now()))
        while True:
            await asyncio.sleep(boot.interval)
            await self.ask(call.Heartbeat())


async def main(cid: str, url: str, password: str | None) -> None:
    """Connect, and be a charge point until somebody says stop."""
    headers = {}
    if password is not None:
        headers["Authorization"] = "Basic " + base64.b64encode(f"{cid}:{password}".encode()).decode()
    async with websockets.connect(
        f"{url}/{quote(cid, safe='')}", subprotocols=["ocpp1.6"], additional_headers=headers
    ) as connection:
        charge_point = ChargePoint(cid, connection)
        tasks: list[Coroutine[Any, Any, None]] = [charge_point.start(), charge_point.charge()]
        await asyncio.gather(*tasks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A small OCPP 1.6 charge point.")
    parser.add_argument("cid", metavar="ID", help="its identity")
    parser.add_argument("--url", default="ws://127.0.0.1:33033/ocpp", help="of the central system, without identity")
    parser.add_argument("--password", help="for HTTP Basic authentication")
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(options.cid, options.url, options.password))
