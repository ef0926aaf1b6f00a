"""What must not be shown or committed: users and passwords in URLs, and what the environment holds of secrets."""

import json
import os
import re
from urllib.parse import quote, unquote

SECRET = re.compile(  # in a variable's name
    r"KEY|TOKEN|SECRET|PASS|_PWD|CREDENTIAL|AUTH(?!ORS?(_|$))|WEBHOOK|CONNECTION_STRING|DSN", re.IGNORECASE
)
USER_IN_URL = re.compile(r"(?<=://)[^/\s'\"?#]+@")
SECRET_IN_QUERY, WHOLE_NAME = (  # in any case without a flag, which a form's pattern cannot have
    re.sub("[a-z]", lambda found: f"[{found[0]}{found[0].upper()}]", words)
    for words in ("signature|token|secret|password|passwd|pwd|api[-_]?key|access[-_]?key(?:[-_]?id)?", "sig|key")
)
SECRET_IN_PARAMETER = re.compile(  # quotes are part of it: nothing is quoted around it
    rf"://(?:[^/\s?#]+@|[^\s#]*[?&](?:[^\s#=&?]*(?:{SECRET_IN_QUERY})|{WHOLE_NAME})=)"
)
PASSWORD_IN_URL = re.compile(r"://[^/\s:@]*:([^/\s]+)@|https?://([^/\s:@]+)@")  # or a token in its place
SHORTEST_SECRET = 6  # shorter ones would make holes in every text


def redact(text: str) -> str:
    """Text without users and passwords in URLs, and without what the environment holds of secrets.

    These are the variables with the name of a secret, line by line, and passwords in the URLs of others.
    """
    text = USER_IN_URL.sub("", text)
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def redact_url(text: object) -> str:
    """What is said of a download: text without users, passwords and query strings of URLs, whatever they hold."""
    return re.sub(r"\?[^\s#'\"]*", "", hide_users(str(text)))


def hide_users(text: str) -> str:
    """Text without what stands before an @ in URLs; unlike in `redact`, it can hold any letter of a password."""
    return re.sub(r"(?<=//)[^/\s'\"]*@", "", text)


def _secrets() -> set[str]:
    """What must not be shown, as it is and as it stands in a URL or in JSON."""
    found = {line.strip() for name, value in os.environ.items() if SECRET.search(name) for line in value.splitlines()}
    for value in os.environ.values():
        found |= {unquote(password or token) for password, token in PASSWORD_IN_URL.findall(value)}
    written = (lambda text: quote(text, safe=""), quote, lambda text: json.dumps(text)[1:-1])
    found |= {write(secret) for secret in found for write in written}
    return {secret for secret in found if len(secret) >= SHORTEST_SECRET}


def refuse_password(key: str, text: str) -> None:
    """Raises ValueError for text with a user, password or signature in a URL."""
    if SECRET_IN_PARAMETER.search(text):
        shown = redact(re.sub(r"[?&]\S*", "?...", re.sub(r"://[^/\s?#]+@", "://", text)))[:200]
        raise ValueError(
            f"{key} has a URL with a user, password or signature ({shown}), and params.yaml is committed; give the URL "
            "without it, and put a password into ~/.netrc: machine HOST login USER password PASSWORD"
        )
