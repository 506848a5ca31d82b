"""Limits as values: their text, their fields, and what is wrong with either."""

from __future__ import annotations

import pytest
from guestnet import Limit, NatConfig, Policy, PolicyError, Rule


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("10mbit/2mbit", {"down": 10_000_000, "up": 2_000_000}),
        ("1gbit", {"down": 10**9, "up": 10**9}),
        ("500kbit,flows=10", {"down": 500_000, "up": 500_000, "open_flows": 10}),
        ("flows=10,new-flows=3,queries=5", {"open_flows": 10, "new_flows": 3, "queries": 5}),
        ("packets=1000", {"packets_down": 1000, "packets_up": 1000}),
        ("total=10gb", {"total": 10**10}),
        ("1.5mbit,total=2gib", {"down": 1_500_000, "up": 1_500_000, "total": 2 << 30}),
    ],
)
def test_the_text_of_a_limit(text: str, fields: dict[str, int]) -> None:
    limit = Limit.from_text(text)
    assert limit == Limit(**fields)
    assert Limit.from_text(str(limit)) == limit
    assert Limit.of(limit.to_data()) == limit
    assert hash(limit) == hash(Limit(**fields))


def test_a_limit_that_its_text_cannot_say() -> None:
    limit = Limit(up=1_000_000, packets_up=7)
    assert limit.to_data() == {"up": 1_000_000, "packets_up": 7}
    assert Limit.of(limit.to_data()) == limit
    assert limit.for_data_plane() == (125_000, None, 7, None, None, None, None, None)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("", "no number"),
        ("fast", "mbit"),
        ("10", "mbit"),
        ("10mbyte", "mbit"),
        ("1bit", "between 8000"),
        ("10mbit,5mbit", "two rates"),
        ("10mbit/2mbit/1mbit", "no number"),
        ("flow=3", "Did you mean flows?"),
        ("flows=0", "between 1"),
        ("flows=many", "no number"),
        ("total=9999999999tb", "between 1"),
        (5, "not a limit"),
        ({"speed": 3}, "no 'speed'"),
        ({"up": True}, "whole number"),
        ({"up": 1.5e6}, "whole number"),
    ],
)
def test_a_wrong_limit_says_what_to_write(wrong: object, words: str) -> None:
    with pytest.raises(PolicyError, match="limit") as caught:
        Limit.of(wrong)
    assert words in str(caught.value)


def test_a_rule_with_a_limit_is_written_and_read() -> None:
    policy = Policy("deny", [Rule("allow", "public", limit="5mbit")])
    assert 'limit = "5mbit"' in policy.to_toml()
    assert Policy.from_toml(policy.to_toml()) == policy
    assert Policy.from_json(policy.to_json()) == policy
    assert policy.rules[0] != Rule("allow", "public")
    for rule in (
        ("deny", "public", "5mbit"),
        ("allow", "public", "flows=3"),
        ("allow", "guest:vm1", "5mbit"),
    ):
        with pytest.raises(PolicyError, match="limit"):
            Rule(rule[0], rule[1], limit=rule[2])


def test_limits_are_settings_of_a_network() -> None:
    config = NatConfig(limit="10mbit/2mbit", guest_limit={"open_flows": 5})
    assert (config.limit, config.guest_limit) == (Limit.from_text("10mbit/2mbit"), Limit(open_flows=5))
    with pytest.raises(PolicyError):
        NatConfig(limit="fast")
