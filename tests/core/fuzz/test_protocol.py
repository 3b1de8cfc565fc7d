"""Protocol against the model, and against itself: however the same octets are cut, the same comes of them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from . import campaign, speech
from .conversing import SETTINGS, Heard, Setting, converse
from .model import Walk

OCTETWISE = 2500
"""Octets up to which an input is also fed octet by octet."""


@dataclass(frozen=True)
class Session(campaign.Case):
    """What a client says to a server of this setting."""

    setting: Setting

    def check(self) -> None:
        whole = converse(self.setting, [self.data])
        walk = Walk(self.setting, self.data, whole)
        walk.run()
        self._compare(whole, speech.cut(Random(self.cut), self.data))
        if self.cut % 4 == 0 and len(self.data) <= OCTETWISE:
            self._compare(whole, speech.octets(self.data))

    def _compare(self, whole: Heard, pieces: list[bytes]) -> None:
        heard = converse(self.setting, pieces)
        assert heard.is_like(whole), f"in {len(pieces)} pieces it is another dialogue: {heard} instead of {whole}"


def session(chance: Random) -> Session:
    setting = chance.choice(SETTINGS)
    return Session(speech.session(chance, setting.greeting), chance.randrange(1 << 30), setting)


def test_every_dialogue_is_what_the_model_says_however_it_is_cut() -> None:
    campaign.run("protocol", 40, session)
