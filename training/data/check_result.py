"""What a look at a data set gave: its findings, and how they are told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

SEVERITIES = ("error", "warning", "note")
UNPAIRED_MAP, UNPAIRED_PICTURE = "unpaired map", "unpaired picture"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about one pair of a data set, or about a file that is in none."""

    index: int | None
    """Of the example; None of a file that is in no pair."""
    name: str
    """The example's, or the file's."""
    severity: str
    """"error": the pair cannot be used. "warning": the map looks wrong, or a file is in no pair. "note":
    worth knowing.
    """
    code: str
    """A short name that stays the same: "missing", "broken", "aspect", "duplicate" ..."""
    message: str
    """What is wrong, in plain words, with the file."""
    cure: str = ""


@dataclass(frozen=True)
class Check:
    """What a look at every pair gave."""

    sizes: list[tuple[int, int] | None]
    """Width and height of each picture, upright; None where it cannot be read."""
    digests: list[str | None]
    """SHA-256 of each picture's content (`Piece.digest`), in hexadecimal."""
    findings: list[Finding]
    """In the order of the examples; then those of files that are in no pair."""
    usable: list[int]
    """Numbers of the examples that have no error."""
    captioned: int
    """How many examples have a caption."""
    mapped: int
    """How many examples have maps, that is, files or poses of which maps are made."""
    seconds: float

    @property
    def counts(self) -> dict[str, int]:
        """How many pairs (or files in none) have each finding, by its code, errors first."""
        order = sorted(self.findings, key=lambda found: SEVERITIES.index(found.severity))
        pairs = dict.fromkeys((found.code, found.index, found.name) for found in order)
        return dict(Counter(code for code, *_ in pairs))

    @property
    def errors(self) -> list[Finding]:
        """The findings that make a pair unusable."""
        return [found for found in self.findings if found.severity == "error"]

    def problem(self, names: int = 5) -> str:
        """Return one line that names the pairs that cannot be used, at most `names` of them; "" for none."""
        errors = self.errors
        if not errors:
            return ""
        count = len(self.sizes) - len(self.usable)
        first = list({found.index: found.message for found in reversed(errors)}.values())[::-1]
        rest = f"; and {count - names:,} more" * (count > names)
        return f"{count:,} of {len(self.sizes):,} pairs cannot be used: {'; '.join(first[:names])}{rest}"

    def about_unpaired(self) -> str:
        """Return one line about files that are in no pair, naming the first; "" where there are none."""
        counts, words = self.counts, {UNPAIRED_MAP: "map", UNPAIRED_PICTURE: "picture"}
        told = [f"{counts[c]:,} {what}{'s' * (counts[c] > 1)}" for c, what in words.items() if c in counts]
        first = next((found.name for found in self.findings if found.code in words), "")
        return f"in no pair: {' and '.join(told)}, such as {first}" if told else ""

    def table(self, names: int = 5) -> list[str]:
        """Return lines that say what is there, and each sort of finding with at most `names` of its pairs."""
        maps, pictures = (
            f", and {self.counts[code]:,} in no pair" if code in self.counts else ""
            for code in (UNPAIRED_MAP, UNPAIRED_PICTURE)
        )
        lines = [
            f"pairs      {len(self.sizes):,}, of which {len(self.usable):,} can be used",
            f"pictures   {_about_sizes(self.sizes)}{pictures}",
            f"maps       {f'{self.mapped:,} of {len(self.sizes):,}' if self.mapped else 'none'}{maps}",
            f"captions   {self.captioned:,} of {len(self.sizes):,}",
        ]
        groups: dict[tuple[str, str], list[Finding]] = {}
        for found in sorted(self.findings, key=lambda found: SEVERITIES.index(found.severity)):
            groups.setdefault((found.severity, found.code), []).append(found)
        for (severity, code), group in groups.items():
            lines += ["", f"{severity}: {code}, {len(group):,}"]
            lines += [f"  {found.message}" for found in group[:names]]
            lines += [f"  and {len(group) - names:,} more"] * (len(group) > names)
            lines += [f"  cure: {cure}" for cure in sorted({found.cure for found in group[:names]} - {""})]
        return lines


def _about_sizes(sizes: Sequence[tuple[int, int] | None]) -> str:
    """The sizes that there are, in a few words."""
    counts = Counter(size for size in sizes if size is not None)
    if not counts:
        return "none can be read"
    if len(counts) == 1:
        ((width, height),) = counts
        return f"all {width} x {height}"
    low, high = (pick(counts, key=lambda size: size[0] * size[1]) for pick in (min, max))
    (width, height), most = counts.most_common(1)[0]
    return (
        f"{low[0]} x {low[1]} to {high[0]} x {high[1]}, {len(counts):,} sizes; most often {width} x {height} "
        f"({most:,})"
    )
