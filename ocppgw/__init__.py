"""ocppgw: a gateway between EV charge points (OCPP-J over WebSocket) and services on any MQTT broker."""

__version__ = "0.1.0"
