"""The errors that autocompress raises on purpose.

    AutocompressError
    ├── ConfigError        a setting or an argument is wrong; nothing has been spent
    ├── UnsupportedLayer   a transform can't act on this layer; the text says why
    ├── StudyMismatch      the study in the database was made with other settings
    ├── DamagedArtifact    stored weights are gone or can't be read
    ├── DatabaseLost       the database has been away for too long
    ├── TrainingDiverged   loss or weights stopped being finite numbers
    └── TrialTimeout       a trial took longer than the study file lets it

Every text names the value, the rule and the cure.
"""

import errno
from collections.abc import Iterable
from difflib import get_close_matches

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""The system's errors of which more space is the cure."""


class AutocompressError(Exception):
    """Base of all errors that autocompress raises on purpose."""


class ConfigError(AutocompressError):
    """A setting is wrong; raised before any work is spent."""


class UnsupportedLayer(AutocompressError):
    """A transform can't act on a layer; the message is the reason."""


class StudyMismatch(AutocompressError):
    """The stored study was made with other settings than the ones given."""


class DamagedArtifact(AutocompressError):
    """Something that was stored is not there any more, or can't be read."""


class DatabaseLost(AutocompressError):
    """The database could not be reached for as long as it was waited for."""


class TrainingDiverged(AutocompressError):
    """The loss became NaN or infinite while training."""


class TrialTimeout(AutocompressError):
    """A trial took longer than it may."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error line: the nearest known word, if any, and all known words."""
    words = sorted(known)
    near = get_close_matches(word, words, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"{hint} Known: {', '.join(words)}."
