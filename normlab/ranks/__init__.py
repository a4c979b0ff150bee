"""The ranks of a run as processes: started, watched, ended, and never left behind.

``agent`` starts them on this machine and says how they ended; ``group`` is what one rank does to
be one of them; ``watch`` notices ranks that stand still; ``failures`` tells which failed first.
"""

from normlab.ranks.failures import RankFailed, one_line
from normlab.ranks.group import ended_by, joined, launched, place, prepare, restarts
from normlab.ranks.watch import watched

__all__ = [
    "RankFailed",
    "ended_by",
    "joined",
    "launched",
    "one_line",
    "place",
    "prepare",
    "restarts",
    "watched",
]
