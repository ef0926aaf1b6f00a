"""What a shell, a launcher or a company's network leaves in the environment, made fit for the commands here."""

import importlib.util
import locale
import os
import sys
from contextlib import suppress

HOST = "127.0.0.1"
PROXIES = tuple(f"{kind}_proxy" for kind in ("http", "https", "all", "socks", "ws"))  # a websocket takes any of them
OF_A_LAUNCHER = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


def settle() -> None:
    """Makes the environment of this process, and of what it starts, fit. It may start the process anew."""
    use_utf8()
    forget_launchers()
    forget_proxies()
    os.environ.update(past_proxies(HOST))


def use_utf8() -> None:
    """Has file names, arguments, pipes and terminals be UTF-8, whatever the locale: the files here are."""
    if locale.getencoding().lower().replace("-", "") != "utf8" and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError):  # a name in another encoding is printed all the same
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def forget_launchers() -> None:
    """Drops what a launcher has left in a shell, by which a process would wait for peers; torchrun's own stays."""
    if "DVC_STAGE" in os.environ:  # DVC starts a stage once, whatever started DVC
        for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
            del os.environ[name]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        for name in OF_A_LAUNCHER:
            os.environ.pop(name, None)


def forget_proxies() -> None:
    """Drops proxies of kinds that no library here can use, as SOCKS: by them not even a local server is reached."""
    if all(importlib.util.find_spec(name) for name in ("socksio", "socks")):
        return
    for name in [name for name in os.environ if name.lower() in PROXIES]:
        scheme, separator, _ = os.environ[name].partition("://")
        if separator and scheme.lower() not in ("http", "https"):
            del os.environ[name]
            print(
                f"warning: {name} is a proxy of {scheme}://, which nothing here can use: requests go past it",
                file=sys.stderr,
            )


def past_proxies(host: str) -> dict[str, str]:
    """The variables that have requests to the servers here pass by a proxy, where the environment has one."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or HOST
    if known == "*" or not set(PROXIES) & {name.lower() for name in os.environ}:
        return {}
    names = ",".join(dict.fromkeys([*known.replace(" ", "").split(","), HOST, "localhost", host]))
    return {"NO_PROXY": names, "no_proxy": names}
