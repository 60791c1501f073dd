"""Who may ask: bearer keys from a file and the environment.

In: lines of keys. Out: yes or no, in a time that does not depend on how much of a key was right.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from pathlib import Path

from qlora_moderation.errors import ConfigError, brief
from qlora_moderation.serving.config import ServeConfig

KEY_VARIABLE = "MODERATION_API_KEY"
_SHORTEST = 16


@dataclasses.dataclass(frozen=True, repr=False)
class Keys:
    """The keys that are let in, as SHA-256 digests of one length; none: everyone is."""

    digests: tuple[bytes, ...] = ()

    def admit(self, authorization: str | None) -> bool:
        """Say whether an Authorization header carries one of the keys."""
        if not self.digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        # every key is compared, so that the time does not tell which of them was right
        equal = [hmac.compare_digest(given, digest) for digest in self.digests]
        return scheme.lower() == "bearer" and any(equal)


def load_keys(config: ServeConfig, environment: Mapping[str, str] | None = None) -> Keys:
    """Read the keys; no message holds any of them.

    Raises:
        ConfigError: a file that cannot be read or holds no key, a key that is short or odd, or none at all where other
            machines reach the server.
    """
    environment = os.environ if environment is None else environment
    found: list[tuple[str, str]] = []
    if config.api_key_file is not None:
        place = f"--api_key_file {config.api_key_file}"
        try:
            lines = Path(config.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else brief(error)
            raise ConfigError(f"{place}: cannot be read ({reason})") from None
        keys = [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
        if not keys:
            raise ConfigError(f"{place}: holds no key; write one a line, or leave the option out")
        found += [(f"{place}, line {number}", key) for number, key in keys]
    if KEY_VARIABLE in environment:
        keys_given = re.split(r"[\s,]+", environment[KEY_VARIABLE].strip(" \t\r\n,"))
        if keys_given == [""]:
            raise ConfigError(f"{KEY_VARIABLE}: is set and holds no key; unset it to serve without keys")
        found += [(KEY_VARIABLE, key) for key in keys_given]
    for place, key in found:
        if len(key) < _SHORTEST or not re.fullmatch(r"[!-~]+", key):
            raise ConfigError(
                f"{place}: a key needs at least {_SHORTEST} characters, printable ASCII without spaces; "
                "`openssl rand -hex 32` makes one"
            )
    if not found and not config.is_local and not config.allow_unauthenticated:
        raise ConfigError(
            f"--host {config.host}: would let every machine that reaches it ask without a key; give --api_key_file or "
            f"{KEY_VARIABLE}, or say --allow_unauthenticated True"
        )
    return Keys(tuple(hashlib.sha256(key.encode()).digest() for _, key in found))
