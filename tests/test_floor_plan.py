"""The floor plan: which module may import which, and who alone knows a library."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ocppgw"
PLUGIN = ROOT / "twisted" / "plugins" / "ocppgw_plugin.py"

# Beside these, everybody may import settings and the version. None: everything.
MAY_IMPORT: dict[str, set[str] | None] = {
    "tap": None,
    "cli": {"config", "auth"},
    "config": {"emqx", "topics"},
    "emqx": set(),
    "settings": {"topics"},
    "websocket": {"handshake", "auth", "interfaces"},
    "handshake": set(),
    "auth": set(),
    "gateway": {"session", "schemas", "topics", "messages", "exactjson", "interfaces"},
    "session": {"asked", "calls", "pacing", "messages", "schemas", "interfaces"},
    "calls": {"messages"},
    "pacing": {"messages"},
    "asked": set(),
    "schemas": set(),
    "messages": {"exactjson"},
    "topics": set(),
    "exactjson": set(),
    "broker": {"mqtt", "handover", "interfaces"},
    "handover": {"interfaces"},
    "mqtt": {"mqttclient", "handover", "interfaces"},
    "mqttclient": {"interfaces"},
    "embedded": set(),
    "rumqttd": set(),
    "endpoints": set(),
    "interfaces": set(),
    "__init__": set(),
}
EVERYBODYS = {"settings", "__version__"}
PURE = ("exactjson", "messages", "schemas", "topics", "handshake")
"""Nothing but the standard library, the JSON library and each other."""
KNOWN_TO = {
    "paho": {"mqtt", "mqttclient"},
    "autobahn": {"websocket"},
    "txaio": {"websocket"},
    "orjson": {"exactjson"},
    "argon2": {"auth"},
    "iotcore": {"rumqttd"},
    "jsonschema_rs": {"schemas"},
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """What a file imports, as dotted names, and whether it does when it is itself imported."""

    def visit(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_once) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "imports are absolute"
                yield from ((f"{child.module}.{alias.name}", at_once) for alias in child.names)
            else:
                lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, at_once and not lazy)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True)


def ours(path: Path) -> set[tuple[str, bool]]:
    """The modules of the package among them, by their short names."""
    return {(name.split(".")[1], at_once) for name, at_once in imports(path) if name.split(".")[0] == "ocppgw"}


def libraries(path: Path) -> set[str]:
    return {name.split(".")[0] for name, _ in imports(path)} - sys.stdlib_module_names - {"ocppgw"}


def test_every_module_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_a_module_imports_what_it_may(module):
    allowed = MAY_IMPORT[module]
    imported = {name for name, _ in ours(PACKAGE / f"{module}.py")} - EVERYBODYS
    assert allowed is None or imported <= allowed


def test_the_plugin_imports_nothing_of_ours_until_it_is_asked():
    assert ours(PLUGIN) == {("auth", False)}


@pytest.mark.parametrize("library", KNOWN_TO)
def test_a_library_is_known_to_few(library):
    users = {path.stem for path in PACKAGE.glob("*.py") if library in libraries(path)}
    assert users == KNOWN_TO[library]


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_needs_no_twisted(module):
    assert libraries(PACKAGE / f"{module}.py") <= {"orjson", "jsonschema_rs"}
    assert MAY_IMPORT[module] is not None
    assert MAY_IMPORT[module] <= set(PURE)


@pytest.mark.parametrize("path", [*PACKAGE.glob("*.py"), PLUGIN], ids=lambda path: path.stem)
def test_nobody_imports_the_reactor_when_he_is_imported(path):
    # Who imports it installs it, and it can be installed once (twistd --reactor).
    assert ("twisted.internet.reactor", True) not in set(imports(path))


def test_the_whole_package_can_be_imported_without_a_reactor():
    modules = ", ".join(f"ocppgw.{module}" for module in MAY_IMPORT if module not in ("rumqttd", "__init__"))
    source = f"import sys, {modules}; sys.exit('twisted.internet.reactor' in sys.modules)"
    subprocess.run([sys.executable, "-c", source], cwd=ROOT, check=True, timeout=60)


def test_the_readme_shows_this_plan():
    text = (ROOT / "README.rst").read_text(encoding="utf-8")
    plan = text[text.index("The modules, and what each may import") :].split("\n\n")[1]
    for line in plan.splitlines():
        row = re.fullmatch(r" {4}(\w+) +(?:[^>]+?)(?: -> (.+))?", line)
        assert row is not None, line
        allowed = MAY_IMPORT[row[1]]
        shown = set(row[2].split(", ")) - EVERYBODYS if row[2] else set()
        assert shown == ({"all of them"} if allowed is None else allowed), line
