"""Policies as values: text, files, warnings, and what wrong ones are answered with."""

from __future__ import annotations

import copy
import pickle
from datetime import UTC, datetime
from pathlib import Path

import pytest
from guestnet import Policy, PolicyError, Rule
from guestnet.policy.destination import GROUPS, parse_target
from guestnet.policy.presets import PRESETS

RULES = [
    Rule.from_text("allow", text)
    for text in ("pypi.org", "*.debian.org:443", ".ok.example", "10.1.0.0/16:5432/tcp", "any/icmp", "public")
] + [
    Rule("allow", "git.example", ports=22, match="address", label="git é \x7f".replace("\x7f", "x")),
    Rule("deny", "guests", source=("vm1", "tag:ci")),
    Rule("allow", direction="in", source="198.51.100.0/24", ports=("8000-8100", 22)),
    Rule("ask", "any", expires=datetime(2030, 1, 31, tzinfo=UTC), log=True),
    Rule("allow", ".data.example", query_types="all", ports="*", protocol="tcp"),
]


def test_files_say_what_was_written() -> None:
    policy = Policy("ask", RULES, refuse="prohibited", pin_min=60, explain=True)
    assert Policy.from_toml(policy.to_toml()) == policy
    assert Policy.from_json(policy.to_json()) == policy
    assert Policy.from_dict(policy.to_dict()) == policy
    assert pickle.loads(pickle.dumps(policy)) == copy.deepcopy(policy) == policy
    assert hash(Policy.from_toml(policy.to_toml())) == hash(policy)
    assert eval(repr(policy), {"Policy": Policy, "Rule": Rule}) == policy


@pytest.mark.parametrize("name", ["policy.toml", "policy.json"])
def test_a_file_is_replaced_as_a_whole(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for policy in (Policy("deny", RULES), Policy("allow")):
        policy.save(path)
        assert Policy.load(path) == policy
    assert [one.name for one in tmp_path.iterdir()] == [name]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_policy_does_not_change() -> None:
    policy, rule = Policy("deny", RULES), RULES[0]
    for value, name in ((policy, "default"), (rule, "action")):
        with pytest.raises(AttributeError, match="does not change"):
            setattr(value, name, "allow")
        with pytest.raises(AttributeError, match="does not change"):
            delattr(value, name)
    assert policy.replace(default="allow").rules == policy.rules


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pypi.org", ("pypi.org", None, None)),
        ("PyPI.org.", ("pypi.org", None, None)),
        ("pypi.org:443", ("pypi.org", ((443, 443),), None)),
        ("pypi.org:*", ("pypi.org", (), None)),
        ("*.debian.org:8000-8100/tcp", ("*.debian.org", ((8000, 8100),), "tcp")),
        (".ok.example", (".ok.example", None, None)),
        ("10.0.0.0/8", ("10.0.0.0/8", None, None)),
        ("10.0.0.0/8/udp", ("10.0.0.0/8", None, "udp")),
        ("10.1.0.0/16:5432/tcp", ("10.1.0.0/16", ((5432, 5432),), "tcp")),
        ("192.0.2.1", ("192.0.2.1/32", None, None)),
        ("2001:db8::1", ("2001:db8::1/128", None, None)),
        ("2001:db8::/32", ("2001:db8::/32", None, None)),
        ("[2001:db8::]/32:53/udp", ("2001:db8::/32", ((53, 53),), "udp")),
        ("[::1]:80", ("::1/128", ((80, 80),), None)),
        ("private", ("private", None, None)),
        ("public:443", ("public", ((443, 443),), None)),
        ("any/icmp", ("any", None, "icmp")),
        ("*", ("any", None, None)),
        ("guest:vm1", ("guest:vm1", None, None)),
        ("guest:vm1:80", ("guest:vm1", ((80, 80),), None)),
        ("bücher.example", ("xn--bcher-kva.example", None, None)),
        ("localhost", ("localhost", None, None)),
    ],
)
def test_destinations_of_the_command_line(text: str, expected: tuple[object, ...]) -> None:
    target = parse_target(text)
    assert (str(target.destination), target.ports, target.protocol) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no destination"),
        ("a b", "is no destination"),
        ("10.0.0.1/8", "write 10.0.0.0/8"),
        ("10.0.0.0/33", "wrong prefix length"),
        ("999.1.1.1", "is no destination"),
        ("1.2.3", "is no destination"),
        ("privat", "Did you mean private?"),
        ("pypi.org:", "no port behind its colon"),
        ("pypi.org:http", "no port behind its colon"),
        ("pypi.org:0", "between 1 and 65535"),
        ("pypi.org:99999", "between 1 and 65535"),
        ("pypi.org:90-80", "write 80-90"),
        ("pypi.org/tpc", "Did you mean tcp?"),
        ("any:80/icmp", "ICMP has not"),
        ("-x.example", "is no destination"),
        ("*.*.example", "is no destination"),
        ("a" * 64 + ".example", "is no destination"),
        ("x\0.example", "is no destination"),
        ("fe80::1%eth0", "is no destination"),
    ],
)
def test_wrong_destinations_say_what_to_write(text: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says.replace("?", r"\?")):
        Rule.from_text("allow", text)


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("default = 'deny'\n\n[[rule]]\naction = 'alow'\nto = 'x.example'", "line 3: Rule 1: action 'alow'"),
        ("[[rule]]\nto = 'x.example'", "Rule 1: A rule has no action"),
        ("[[rule]]\naction = 'deny'\nprot = 'tcp'", "Did you mean .*protocol"),
        ("defualt = 'deny'", "Did you mean default?"),
        ("pin_min = 0", "line 1: pin_min 0"),
        ("pin_min = 9" + "9" * 5000, "is no TOML"),
        ("audit = 'never'", "audit 'never' is none of 'best_effort', 'required'"),
        ("explain = 1", "neither true nor false"),
        ("rule = 'x'", "rule is no list of tables"),
        ("rule = [1]", "Rule 1: A rule 1 is no table"),
        ("[[rule]", "is no TOML"),
        ("[[rule]]\naction = 'allow'\nports = []", "ports is empty"),
        ("[[rule]]\naction = 'allow'\nports = [true]", "is not a number"),
        ("[[rule]]\naction = 'allow'\nexpires = 2030-01-01", "expires"),
        ("[[rule]]\naction = 'allow'\nexpires = 1e400", "expires"),
        ("[[rule]]\naction = 'allow'\nto = 'a.example'\nlabel = \"\\u0000\"", "label"),
        ("[[rule]]\naction = 'ask'\ndirection = 'in'", "'ask' is for flows to the outside"),
        ("[[rule]]\naction = 'allow'\nto = 'a.example'\ndirection = 'in'", "leave `to` out"),
        ("[[rule]]\naction = 'allow'\nmatch = 'address'", "match = 'address' is for names"),
        ("x = " + "[" * 5000, "TOML|nested"),
    ],
)
def test_a_wrong_file_is_answered_with_the_place_and_the_remedy(toml: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says.replace("default?", "default")) as caught:
        Policy.from_toml(toml, file="net.toml")
    assert str(caught.value).startswith("net.toml")


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xff")
    for path in (tmp_path / "none", tmp_path, tmp_path / "latin", "", "a\0b"):
        with pytest.raises(PolicyError):
            Policy.load(path)
    with pytest.raises(PolicyError, match="cannot be written"):
        Policy().save(tmp_path / "none" / "policy.toml")


def test_what_is_asked_is_what_the_rules_say() -> None:
    policy = Policy("deny", RULES[:6])
    for destination, verdict, number in (
        ("pypi.org", "allow", 1),
        ("pypi.org:22", "allow", 6),
        ("deb.debian.org", "allow", 2),
        ("10.1.2.3:5432", "allow", 4),
        ("10.1.2.3:22", "deny", None),
        ("10.1.2.3/icmp", "allow", 5),
        ("[2600::1]:80", "allow", 6),
    ):
        decision = policy.check(destination)
        assert (decision.verdict, decision.number) == (verdict, number), str(decision)
    strict = Policy("deny", [Rule("allow", "pypi.org"), Rule("allow", "10.0.0.0/8", source="vm1")])
    assert not strict.check("evil.example").allowed
    assert "may not be asked for" in strict.check("evil.example").reason
    assert strict.check("10.0.0.1:80", guest="vm1").allowed
    assert not strict.check("10.0.0.1:80", guest="vm2").allowed
    for wrong in ("any", "*.x.example", "10.0.0.0/8", "public", "10.0.0.1/any"):
        with pytest.raises(PolicyError):
            policy.check(wrong)


def test_rules_that_can_never_match_are_pointed_out() -> None:
    def never(*rules: Rule) -> list[str]:
        return [one for one in Policy("deny", rules).warnings() if "can never match" in one]

    allow, deny = (lambda text: Rule.from_text("allow", text)), (lambda text: Rule.from_text("deny", text))
    assert never(allow("any"), deny("10.0.0.0/8"))
    assert never(deny("10.0.0.0/8"), allow("10.1.0.0/16:80"))
    assert never(allow(".example"), allow("a.b.example"))
    assert never(deny("x.example"), allow("x.example"))
    assert not never(allow("10.0.0.0/8:80"), deny("10.1.0.0/16"))
    assert not never(Rule("allow", "any", source="vm1"), deny("10.0.0.0/8"))
    assert not never(allow("*.example"), allow("example"))
    ssh = Policy("deny", [Rule("allow", "git.example", ports=22)]).warnings()
    assert "the server speaks first" in ssh[0]
    assert "shares an address" in Policy("deny", [RULES[6]]).warnings()[0]


def test_presets_are_policies() -> None:
    for name in PRESETS:
        assert isinstance(Policy.preset(name), Policy)
    assert Policy.preset("dev").check("files.pythonhosted.org").allowed
    assert Policy.preset("dev").check("github.com:22").allowed
    assert not Policy.preset("dev").check("evil.example").allowed
    assert not Policy.preset("public").check("10.0.0.1").allowed
    with pytest.raises(PolicyError, match="Did you mean public"):
        Policy.preset("publik")


def test_rules_end() -> None:
    ends = datetime(2030, 1, 1, tzinfo=UTC)
    policy = Policy("deny", [Rule("allow", "any", expires=ends), RULES[0]])
    assert policy.next_expiry == ends.timestamp()
    assert policy.without_expired(ends.timestamp() - 1) is policy
    assert policy.without_expired(ends.timestamp()).rules == (RULES[0],)


def test_a_large_policy_is_read_and_compiled() -> None:
    text = "default = 'deny'\n" + "".join(
        f"[[rule]]\naction = 'allow'\nto = '10.{n >> 8 & 255}.{n & 255}.0/24'\n" for n in range(20_000)
    )
    policy = Policy.from_toml(text)
    assert len(policy.rules) == 20_000
    assert policy.check("10.5.5.5").allowed
    assert len(policy.warnings()) == 0


def test_every_group_is_known_to_the_data_plane() -> None:
    Policy("deny", [Rule("allow", group) for group in GROUPS]).compile(lambda _source: [])


def test_known_resolvers_over_https_are_a_group_of_names() -> None:
    policy = Policy("deny", [Rule("deny", "doh"), Rule("allow", "public"), Rule("allow", ".google.com")])
    for name in ("dns.google", "cloudflare-dns.com", "mozilla.cloudflare-dns.com", "use-application-dns.net"):
        decision = policy.check(name)
        assert (decision.verdict, decision.rule) == ("deny", "deny doh"), name
    assert policy.check("pypi.org").allowed
    assert Policy.from_toml(policy.to_toml()) == policy
    own = policy.with_rules_first([Rule("allow", "dns.google")])
    assert own.check("dns.google").allowed
    assert not own.check("dns.google.com").allowed
    with pytest.raises(PolicyError, match="doh"):
        policy.check("doh")
    assert policy.warnings() == []
