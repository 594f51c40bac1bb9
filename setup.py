"""Metadata, dependencies and entry points of ocppgw."""

import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
version = re.findall(r'__version__ = "([^"]+)"', (here / "ocppgw" / "__init__.py").read_text(encoding="utf-8"))


embedded = [
    # The bundled broker for a first try and for tests: rumqttd in a wheel. Never needed beside a real broker.
    "iotcore>=0.4,<0.5",
]
schemas = [
    # Payloads against JSON schemas: the schemas, and a validator in Rust, nine times as quick as the next one.
    "ocpp>=2.0",
    "jsonschema-rs>=0.40",
]
test = [
    *embedded,
    *schemas,
    "pytest>=8",
    "pytest-cov>=6",
    "hypothesis>=6.100",
    # Charge points and a central system that are not ours, for the interoperability tests.
    "ocpp>=2.0",
    "websockets>=14",
    # Certificate authorities and certificates in tests.
    "trustme>=1.2",
]
examples = ["ocpp>=2.0", "websockets>=14"]
lint = [
    *test,
    "ruff>=0.17,<0.18",
    # mypy-zope is written against one release of mypy: the pair is pinned together.
    "mypy==2.4.1",
    "mypy-zope==1.0.17",
]

setup(
    name="ocppgw",
    version=version[0],
    description="A gateway between EV charge points (OCPP-J over WebSocket) and services on any MQTT broker",
    long_description=(here / "README.rst").read_text(encoding="utf-8"),
    long_description_content_type="text/x-rst",
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: No Input/Output (Daemon)",
        "Framework :: Twisted",
        "Intended Audience :: Developers",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Home Automation",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # {"": "."} and not the default: only then does `pip install -e .` put this directory itself on sys.path,
    # which is where twistd looks for twisted/plugins.
    package_dir={"": "."},
    packages=["ocppgw", "twisted.plugins"],
    package_data={"ocppgw": ["py.typed"]},
    install_requires=[
        # The reactor, cred, endpoints, the daemon; [tls] is pyOpenSSL, service-identity and idna.
        "Twisted[tls]>=25.5",
        "service-identity>=24.2",
        "pyOpenSSL>=24.3",
        # The WebSocket protocol. The upper bound is deliberate: websocket.py overrides hooks of it.
        "autobahn>=26.10.2,<27",
        # MQTT 3.1.1 and 5.
        "paho-mqtt>=2.1,<3",
        # JSON of the hot path, five times as quick as the standard library's.
        "orjson>=3.10",
        # Hashes of the password file (argon2id).
        "argon2-cffi>=23.1",
    ],
    extras_require={"embedded": embedded, "schemas": schemas, "examples": examples, "test": test, "lint": lint},
    entry_points={"console_scripts": ["ocppgw = ocppgw.cli:main"]},
    zip_safe=False,
)
