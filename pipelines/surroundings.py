"""What a shell, a launcher or a company's network leaves in the environment, made fit for the commands here."""

import getpass
import importlib.util
import locale
import os
import sys
from contextlib import suppress
from pathlib import Path

HOST = "127.0.0.1"
QUIET = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_UI_V2_ENABLED": "false",  # whose pages call an analytics host whatever the settings
}
OF_A_CALLER = {  # by which a git that calls us, as in a hook or an alias, tells its children where and how it works
    "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_ATTR_SOURCE", "GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE", "GIT_COMMON_DIR",
    "GIT_CONFIG", "GIT_DEFAULT_HASH", "GIT_DIFF_OPTS", "GIT_DIR", "GIT_EXTERNAL_DIFF", "GIT_GLOB_PATHSPECS",
    "GIT_GRAFT_FILE", "GIT_ICASE_PATHSPECS", "GIT_IMPLICIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_INDEX_VERSION",
    "GIT_INTERNAL_SUPER_PREFIX", "GIT_LITERAL_PATHSPECS", "GIT_NAMESPACE", "GIT_NOGLOB_PATHSPECS",
    "GIT_NO_REPLACE_OBJECTS", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX", "GIT_QUARANTINE_PATH", "GIT_REFLOG_ACTION",
    "GIT_REPLACE_REF_BASE", "GIT_SHALLOW_FILE", "GIT_WORK_TREE",
}  # fmt: skip
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
    own = own_environment() | bypass_proxies(HOST)
    for name in os.environ.keys() - own.keys():
        del os.environ[name]
    os.environ.update(own)


def own_environment() -> dict[str, str]:
    """The environment for what we start: all telemetry off, no git but that of the folder it works in, a user."""
    env = {name: value for name, value in os.environ.items() if name not in OF_A_CALLER}
    return env | QUIET | name_unknown_user()


def name_unknown_user() -> dict[str, str]:
    """The variables by which DVC, Prefect and PyTorch know a user whom this machine does not: a name, a home folder."""
    found = {}
    try:
        getpass.getuser()
    except (KeyError, OSError):
        found["USER"] = f"user-{os.getuid()}"
    home = os.path.expanduser("~")
    if not os.path.isdir(home) or (home == "/" and not os.access(home, os.W_OK)):  # as containers have it
        own = Path.cwd() / "scratch" / "home"
        own.mkdir(parents=True, exist_ok=True)
        found["HOME"] = str(own)
    return found


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


def bypass_proxies(host: str) -> dict[str, str]:
    """The variables that have requests to the servers here pass by a proxy, where the environment has one."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or HOST
    if known == "*" or not set(PROXIES) & {name.lower() for name in os.environ}:
        return {}
    names = ",".join(dict.fromkeys([*known.replace(" ", "").split(","), HOST, "localhost", host]))
    return {"NO_PROXY": names, "no_proxy": names}
