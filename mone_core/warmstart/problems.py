"""Everything that is wrong with some weights, told at once and on one line."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

BLOCK = re.compile(r"(?<=\.)\d+(?=\.)|(?<=encoderblock_)\d+(?=/)")


@dataclass(slots=True)
class Problems:
    """What is wrong with one set of parameters, each list in the order of finding.

    Attributes:
        missing: Names that must be there.
        extra: Names that nothing is made of.
        misshaped: Names with the shape they have and the one they must have.
        others: Whole sentences.
    """

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def shape(self, name: str, has: Sequence[int], must: Sequence[int]) -> None:
        """Note a parameter of the wrong shape."""
        self.misshaped.append(f"{name} is {list(has)} but must be {list(must)}")

    def told(self) -> Iterator[str]:
        """One part of a sentence for each kind of problem that there is."""
        for kind in ("missing", "extra", "misshaped"):
            if names := getattr(self, kind):
                yield f"{kind}: {', '.join(in_few_words(names))}"
        yield from self.others


def in_few_words(names: Iterable[str]) -> list[str]:
    """Names that differ in the number of their block alone as one: `blocks.{0-3,5}.norm1.bias`."""
    blocks: dict[str, list[int]] = {}
    for name in names:
        number = BLOCK.search(name)
        here = blocks.setdefault(BLOCK.sub("{}", name, count=1), [])
        here.extend([int(number[0])] if number else [])
    return [pattern.replace("{}", _numbers(found), 1) for pattern, found in blocks.items()]


def _numbers(found: Sequence[int]) -> str:
    """`2`, `{2,3}` or, from three on, `{2-4}`."""
    if len(found) == 1:
        return str(found[0])
    runs: list[list[int]] = []
    for number in sorted(found):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    told = [f"{r[0]}-{r[-1]}" if len(r) > 2 else ",".join(map(str, r)) for r in runs]
    return f"{{{','.join(told)}}}"
