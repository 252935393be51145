"""What a validator says: one finding for all episodes that show it, with what to do about it."""

import re
from dataclasses import dataclass, field, replace

LEVELS = ("error", "warning", "note")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """level: "error" (readers refuse it, or it would teach something wrong), "warning" (mended by this reader, or
    suspicious), "note". check: the kind of check that found it; episodes: which show it, none for the whole dataset.
    """

    level: str
    check: str
    what: str
    mend: str
    episodes: list[int] = field(default_factory=list)

    def where(self) -> str:
        """The episodes in a few words."""
        shown = ", ".join(map(str, self.episodes[:4]))
        if len(self.episodes) > 4:
            return f"episodes {shown} and {len(self.episodes) - 4} more"
        return f"episode{'s' * (len(self.episodes) > 1)} {shown}" if self.episodes else "dataset"


class Findings:
    """Collects findings; those that differ in the episode alone become one."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str], tuple[str, dict[int, None]]] = {}  # its mend, and its episodes in order

    def add(self, level: str, check: str, what: str, mend: str, episode: int | None = None) -> None:
        """Say something; with an episode, of that episode."""
        _, episodes = self._found.setdefault((level, check, what), (mend, {}))
        if episode is not None:
            episodes[episode] = None

    def list(self) -> list[Finding]:
        """Errors first, then in the order in which they were found."""
        found = [Finding(level=level, check=check, what=what, mend=mend, episodes=[*episodes])
                 for (level, check, what), (mend, episodes) in self._found.items()]  # fmt: skip
        return sorted(found, key=lambda finding: LEVELS.index(finding.level))

    def count(self, level: str) -> int:
        return sum(finding.level == level for finding in self._found.values())


def table(found: list[Finding], title: str) -> str:
    """The findings for people to read; those of episodes that differ in numbers alone stand for each other."""
    counts = ", ".join(f"{n} {level}{'s' * (n != 1)}" for level in LEVELS
                       if (n := sum(finding.level == level for finding in found)))  # fmt: skip
    lines = [f"{title}: {counts or 'nothing to mend'}"]
    alike: dict[tuple[str, ...], list[Finding]] = {}
    for finding in found:
        words = re.sub(r"\b-?\d[\d.]*(e-?\d+)?", "#", finding.what) if finding.episodes else finding.what
        alike.setdefault((finding.level, finding.check, words, finding.mend), []).append(finding)
    for (level, check, _, mend), rows in alike.items():
        episodes = sorted({episode for finding in rows for episode in finding.episodes})
        more = f" ({len(rows) - 1} more like it)" if len(rows) > 1 else ""
        lines += [f"  {level:<8}{check:<11}{replace(rows[0], episodes=episodes).where()}: {rows[0].what}{more}",
                  f"  {'':<19}-> {mend}"]  # fmt: skip
    return "\n".join(lines) + "\n"
