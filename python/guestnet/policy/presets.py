"""Policies with a name, for `--preset`.

>>> preset("public")
('deny', [Rule('allow', 'public')])
"""

from __future__ import annotations

from guestnet.errors import PolicyError
from guestnet.policy.destination import _short, nearest
from guestnet.policy.rule import Rule

DEV_NAMES = (
    # Debian, Ubuntu, Alpine, Fedora, Arch
    *(".debian.org", ".ubuntu.com", ".alpinelinux.org", ".fedoraproject.org", ".archlinux.org"),
    # Python, conda
    *("pypi.org", "files.pythonhosted.org", ".anaconda.com", ".anaconda.org"),
    # JavaScript
    *("registry.npmjs.org", "registry.yarnpkg.com", "nodejs.org"),
    # Rust, Go
    *("crates.io", "index.crates.io", "static.crates.io", "static.rust-lang.org"),
    *("proxy.golang.org", "sum.golang.org", "go.dev", "dl.google.com"),
    # Java, Ruby, PHP, .NET
    *("repo.maven.apache.org", "repo1.maven.org", "plugins.gradle.org", "services.gradle.org"),
    *("rubygems.org", "index.rubygems.org", "repo.packagist.org", "api.nuget.org"),
    # Code
    *("github.com", "api.github.com", "codeload.github.com", ".githubusercontent.com"),
    *("gitlab.com", "bitbucket.org", "codeberg.org"),
)
"""Package registries and code hosts that `dev` allows."""
DEV_SSH = ("github.com", "gitlab.com", "bitbucket.org", "codeberg.org")
"""Code hosts whose SSH `dev` allows."""


def preset(name: str) -> tuple[str, list[Rule]]:
    """A policy with a name.

    Args:
        name: "open" (everything but the floor), "public" (no private addresses), "dev" (package registries
            and code hosts) or "none" (nothing).

    Returns:
        Its default and its rules.

    Raises:
        PolicyError: There is no such policy.
    """
    if name == "open":
        return "allow", []
    if name == "public":
        return "deny", [Rule("allow", "public")]
    if name == "dev":
        names = [Rule("allow", one) for one in DEV_NAMES]
        return "deny", [*names, *(Rule("allow", one, ports=22, match="address") for one in DEV_SSH)]
    if name == "none":
        return "deny", []
    known = ", ".join(PRESETS)
    raise PolicyError(
        f"There is no preset {_short(name)}: choose among {known}.{nearest(str(name), PRESETS)}"
    )


PRESETS = ("open", "public", "dev", "none")
