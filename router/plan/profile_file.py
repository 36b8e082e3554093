"""Profile files (YAML) and the built-in profiles, by one name: what plan, simulate and the router read."""

from __future__ import annotations

from pathlib import Path

import yaml

from cache_service.core.errors import ConfigError
from router.core.profile import ModelProfile, from_dict, to_dict
from router.core.profiles import case_study, table3

MAX_BYTES = 1 << 20
#: Names that stand for a built-in profile instead of a file.
BUILT_IN = ("paper:1T/H200", "paper:1T/H20", *(f"paper:{model}" for model in table3.PHI_GBPS))


def load(name: str, folder: Path, *, field: str) -> ModelProfile:
    """Return the profile that `name` means: one of BUILT_IN, or a file (relative to `folder`).

    Raises ConfigError naming `field` and the place in the file.
    """
    if name.startswith("paper:"):
        if name not in BUILT_IN:
            raise ConfigError(f"{field}: {name!r}; built-in profiles are {', '.join(BUILT_IN)}")
        model = name.removeprefix("paper:")
        case = {"1T/H200": case_study.H200, "1T/H20": case_study.H20}
        return case[model] if model in case else table3.profile(model)
    return read(folder / name, field=field)


def read(path: Path, *, field: str = "profile") -> ModelProfile:
    """Read a profile file. Raises ConfigError naming `field` and the place in the file."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{field}: {path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{field}: {path}: is longer than {MAX_BYTES} bytes, so no profile")
    try:
        return from_dict(yaml.safe_load(data), where=f"{field}: {path}: profile")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field}: {path}: is not YAML: {error}") from error


def write(profile: ModelProfile, path: Path) -> None:
    """Write a profile file. Raises ConfigError when the path cannot be written."""
    text = "# Model profile; written by `prfaas profile`.\n" + yaml.safe_dump(
        to_dict(profile), sort_keys=False, width=100
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
