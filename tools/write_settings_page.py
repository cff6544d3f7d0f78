"""Write docs/settings.md from the settings' structs; a test compares the two."""

from __future__ import annotations

from pathlib import Path

from naiad.cli.settings import Settings
from naiad.core.settings import settings_reference

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"

INTRODUCTION = """\
# Settings

Each setting can be given in four places; a later one wins:

1. its default,
2. a TOML file, `--config naiad.toml`, with a table per section below,
3. the environment: `NAIAD_<SECTION>__<SETTING>`, such as `NAIAD_ENGINE__MAX_NUM_SEQS=8`,
4. a flag: `--max-num-seqs 8`; true and false are `--prefix-cache` and `--no-prefix-cache`.

A list is repeated flags, a TOML array, or commas in the environment. An unknown setting, section or
`NAIAD_` variable is refused, as is a value out of range. Written by `make settings`; do not edit.

"""


def page() -> str:
    """The whole page."""
    return INTRODUCTION + settings_reference(Settings)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
