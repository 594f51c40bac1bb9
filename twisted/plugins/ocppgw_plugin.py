"""What twistd, strcred and endpoint strings find by name: no logic, and no import of ours until it is asked for."""

from twisted.application.service import ServiceMaker

ocppgw = ServiceMaker("ocppgw", "ocppgw.tap", "A gateway between OCPP-J charge points and MQTT.", "ocppgw")
