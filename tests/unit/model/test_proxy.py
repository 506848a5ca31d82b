"""The URL of a proxy: where it comes from, and who sees its credentials."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
from guestnet.errors import ConfigError
from guestnet.model.proxy import ProxyUrl, parts, proxy
from guestnet.model.spec import NatConfig

URL = "socks5://me:secret@192.0.2.1:1080"


def test_credentials_are_not_shown() -> None:
    config = NatConfig(proxy=URL)
    url = config.proxy
    assert url is not None
    for text in (repr(config), str(url), repr(url), f"{url}", f"{url!s}"):
        assert "secret" not in text
        assert "socks5://***@192.0.2.1:1080" in text
    assert parts(url).password == b"secret"
    assert parts(config.replace(mtu=1400).proxy or ProxyUrl("")) == parts(url)
    for again in (copy.deepcopy(url), pickle.loads(pickle.dumps(url))):
        assert parts(again) == parts(url)


def test_errors_do_not_show_credentials() -> None:
    with pytest.raises(ConfigError) as caught:
        NatConfig(proxy="ftp://me:secret@192.0.2.1")
    assert "secret" not in str(caught.value)
    assert "ftp://***@192.0.2.1" in str(caught.value)


def test_the_environment_and_a_file(tmp_path: Path) -> None:
    both = {"HTTPS_PROXY": "http://192.0.2.2", "ALL_PROXY": URL}
    assert proxy("host", both) == URL
    assert proxy("host", {"https_proxy": "http://192.0.2.2"}) == "http://192.0.2.2"
    with pytest.raises(ConfigError, match="finds no proxy"):
        proxy("host", {"HTTP_PROXY": URL})
    file = tmp_path / "url"
    file.write_text(f"{URL}\nnot this\n")
    assert proxy(f"@{file}") == URL
    file.write_text("")
    with pytest.raises(ConfigError):
        proxy(f"@{file}")


def test_socks5h_is_socks5() -> None:
    assert parts(ProxyUrl("socks5h://192.0.2.1")).kind == "socks5"
