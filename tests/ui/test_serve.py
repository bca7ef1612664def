"""Headers, hosts and ports of the server."""

from __future__ import annotations

import base64
import hashlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import streamlit as st
from streamlit import config

from tracer.errors import InputError
from ui import serve


def directives(page: bytes = b"") -> dict[str, list[str]]:
    """The content-security policy by directive."""
    policy = serve.security_headers(page)["content-security-policy"]
    return {name: values for name, *values in (part.split() for part in policy.split(";"))}


def test_the_policy_names_no_remote_origin() -> None:
    values = {value for given in directives().values() for value in given}
    assert values == {"'self'", "'none'", "'unsafe-inline'", "data:", "blob:"}


def test_images_and_scripts_come_from_here() -> None:
    assert directives()["img-src"] == ["'self'", "data:", "blob:"]
    assert directives()["script-src"] == ["'self'", "blob:"]


def test_inline_scripts_of_the_page_are_allowed_by_hash() -> None:
    digest = base64.b64encode(hashlib.sha256(b"let a = 1").digest()).decode()
    assert directives(b"<p><script>let a = 1</script>")["script-src"] == ["'self'", "blob:", f"'sha256-{digest}'"]


def test_local_names_are_allowed_and_no_others() -> None:
    assert serve.allowed_hosts("127.0.0.1") == ["127.0.0.1", "::1", "localhost"]


def test_a_wildcard_address_stands_for_this_machine_only() -> None:
    hosts = serve.allowed_hosts("0.0.0.0")  # noqa: S104
    assert socket.gethostname().lower() in hosts
    assert "*" not in hosts


def test_a_taken_port_is_passed_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.free_port("127.0.0.1", port) != port


def test_a_free_port_is_taken_as_asked() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    assert serve.free_port("127.0.0.1", port) == port


@pytest.mark.parametrize("host", ["not a host", "203.0.113.7"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(InputError, match="give"):
        serve.free_port(host, 0)


@pytest.mark.parametrize("port", [-1, 65536])
def test_an_impossible_port_is_refused(port: int) -> None:
    with pytest.raises(InputError, match="no port"):
        serve.serve(port, store=None)


def test_all_settings_are_known_to_streamlit() -> None:
    given = serve.settings("127.0.0.1", 1, hosts=[])
    assert not set(given) - set(config.get_config_options())
    assert given["browser.gatherUsageStats"] is False


def test_streamlits_page_has_an_inline_script() -> None:
    """If this fails, Streamlit no longer needs the hash."""
    page = (Path(st.__file__).with_name("static") / "index.html").read_bytes()
    assert len(directives(page)["script-src"]) > 1


def test_the_app_loads_no_model_library() -> None:
    code = (
        "import sys; import ui.serve, ui.state, ui.app_pages.runs, ui.app_pages.trace, ui.app_pages.settings;"
        "print([name for name in ('torch', 'transformers', 'langchain') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
