"""Tests of the whole: the real daemon, real brokers, real WebSocket and MQTT clients."""
