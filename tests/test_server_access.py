"""Who is let into the service: with a token, or from this machine."""

from __future__ import annotations

import base64

import pytest
from models import TINY, random_model

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
from local_service import Local
from serving import TOKEN

from sam import Sam
from sam.engine import Engine
from sam.server import Settings


@pytest.fixture
def model() -> Sam:
    return random_model(TINY)


def test_every_route_but_health_needs_the_token(model: Sam) -> None:
    running = Local(Engine(model), Settings(token=TOKEN))
    routes = [(route.path, method) for route in running.app.routes for method in route.methods]
    assert len(routes) >= 11
    for path, method in routes:
        path = path.replace("{name}", "custom")
        open_to_all = path.startswith("/v2/health/")
        for shown in (None, "Bearer wrong", "Bearer", "Basic " + base64.b64encode(b"x:wrong").decode(), "Basic \xff"):
            headers = {} if shown is None else {"Authorization": shown}
            status, answered, _ = running.request(method, path, headers=headers)
            assert (status == 401) != open_to_all, (method, path, shown)
            assert ("www-authenticate" in answered) != open_to_all
        for shown in (f"Bearer {TOKEN}", "Basic " + base64.b64encode(f"any:{TOKEN}".encode()).decode()):
            assert running.request(method, path, headers={"Authorization": shown})[0] not in (401, 403, 500)
    assert running.request("GET", "/nothing")[0] == 401
    running.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_beyond_this_machine_only_with_a_token_or_insecure(host: str) -> None:
    with pytest.raises(ValueError, match="can be reached from other machines: give --token, or --insecure"):
        Settings(host)
    assert Settings(host, token=TOKEN)
    assert Settings(host, insecure=True)


def test_this_machine_needs_no_token() -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        assert Settings(host).loopback
    with pytest.raises(ValueError, match="at least 8 printable"):
        Settings(token="short")
