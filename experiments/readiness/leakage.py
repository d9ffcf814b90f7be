"""Leakage: rows, groups and people that stand in two splits of a node, or at two nodes.

Rows that are alike may be about two people who are: where an identifier tells them apart they are a remark.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.readiness.federation import Federation
from experiments.readiness.findings import IDENTIFIERS, LEAKAGE, Finding, each, some
from experiments.readiness.source import Source
from experiments.readiness.variants import ROW, untraced
from sectors.base import OWN, SPLITS, Rows, num_rows

At = tuple[str, str]
"""A node and a split."""
SERVER: At = ("the server", "own")

Seen = dict[At, list[tuple[bytes, Any]]]
"""For each row of a place its digest, and whom it is about (None: not known)."""
Homes = dict[Any, tuple[At, ...]]
"""What stands in several places -> those places."""


def check_leakage(f: Federation) -> list[Finding]:
    rows = {(node.name, split): node.pooled(split) for node in f.nodes for split in SPLITS}
    who = {(node.name, split): _people(node.source, node.index[split]) for node in f.nodes for split in SPLITS}
    if f.sector.server_data != "none":
        held = f.traced().server_rows(f.synthetic)
        rows[SERVER], who[SERVER] = untraced(held), _people(f.source_of_server(), held[ROW])
    whole: Seen = {at: list(zip(digests(rows[at]), who[at], strict=True)) for at in rows}
    inputs: Seen = {at: list(zip(digests(rows[at], ("x",)), who[at], strict=True)) for at in rows}
    same, alike = _repeats(whole)
    pairs = {pair for at in rows for pair in zip(whole[at], inputs[at], strict=True)}
    same_x, alike_x = _repeats(
        inputs,
        known={x for row, x in pairs if row in same},
        noted={x[0] for row, x in pairs if row[0] in alike},
    )
    advice, other = "drop repeats in `pool`, or give them one group in `groups`", f"of different {f.sector.identifier}"
    failed = [
        *_told(LEAKAGE, same, "identical rows stand", advice),
        *_told(LEAKAGE, same_x, "inputs `x` of rows that differ elsewhere stand", advice),
    ]
    notes = [
        *_told(LEAKAGE, alike, f"rows alike, {other}, stand", "two of them may be alike", passed=None),
        *_told(LEAKAGE, alike_x, f"inputs `x` alike, {other}, stand", "two of them may be alike", passed=None),
    ]
    total = sum(num_rows(here) for here in rows.values())
    whose = f" of one {f.sector.identifier}" if notes else ""
    said = f"{total} rows: each, and each input,{whose} stands in one split of one node"
    return [*(failed or [Finding(LEAKAGE, True, said)]), *notes, *_divided_groups(f)]


def _people(source: Source, index: Any) -> list[Any]:
    return [None] * len(index) if source.people is None else source.people[index].tolist()


def _repeats(seen: Seen, known: Iterable[Any] = (), noted: Iterable[bytes] = ()) -> tuple[Homes, Homes]:
    """Rows of one person in several places, and digests that only different people share; none that was told already.

    Rows about whom nothing is known count as one person's.
    """
    known = set(known)
    same = {row: homes for row, homes in _homes(seen).items() if row not in known}
    told = {digest for digest, _ in (*same, *known)} | set(noted)
    digests_at = {at: [digest for digest, _ in rows] for at, rows in seen.items()}
    return same, {digest: homes for digest, homes in _homes(digests_at).items() if digest not in told}


def _divided_groups(f: Federation) -> list[Finding]:
    many: dict[At, set[int]] = {(node.name, split): set() for node in f.nodes for split in SPLITS}
    num_groups = 0
    for source in f.sources.values():
        groups = f.sector.groups(source.pooled)
        if groups is None:
            return [Finding(LEAKAGE, None, "the sector has no groups: every row is taken to be about somebody else")]
        groups = np.unique(groups, return_inverse=True)[1] + num_groups
        num_groups = int(groups.max(initial=-1)) + 1
        for node in f.nodes:
            if node.source is source:
                for split in SPLITS:
                    many[node.name, split] |= set(groups[node.index[split]].tolist())
    advice = "rows of a group stay together when `load` is left to the library"
    said = f"{num_groups} groups: each is in one split of one node"
    return _told(LEAKAGE, _homes(many), "groups stand", advice) or [Finding(LEAKAGE, True, said)]


def check_identifiers(f: Federation) -> list[Finding]:
    name = f.sector.identifier
    if name is None:
        return [Finding(IDENTIFIERS, None, "no column says whom a row is about: a person at two nodes is not seen")]
    if absent := [source.origin for source in f.sources.values() if source.people is None]:
        said = f"{some(absent)}: no key of `pool` is the identifier {name}, so nobody can be recognised: add it to them"
        return [Finding(IDENTIFIERS, None, said)]
    who, free = {}, {}
    for node in f.nodes:
        fixed = node.source.pooled.split
        for split, index in node.index.items():
            who[node.name, split] = _named(node.source, index)
            free[node.name, split] = _named(node.source, index if fixed is None else index[fixed[index] == OWN])
    homes, divided = _homes(who), _homes(free)
    # the last visit of a patient may be set aside, for a model that predicts it from those before
    aside = {one: at for one, at in homes.items() if one not in divided and len({node for node, _ in at}) == 1}
    wrong = {one: at for one, at in homes.items() if one not in aside}
    what, everyone = f"values of {name} stand", len(set().union(*who.values()))
    where = "at one node" if aside else "in one split of one node"
    judge = f"set aside by `pool`, which is right only where the next row of a known {name} is predicted"
    advice = f"keep the rows of one {name} together in `groups`; of own files, agree whose they are"
    return [
        *(
            _told(IDENTIFIERS, wrong, what, advice)
            or [Finding(IDENTIFIERS, True, f"{everyone} values of {name}: each is {where}")]
        ),
        *_told(IDENTIFIERS, aside, what, judge, passed=None),
    ]


def _named(source: Source, index: Any) -> set[Any]:
    return set(_people(source, index)) - {None}


def _homes(many: Mapping[At, Iterable[Any]]) -> Homes:
    homes: dict[Any, list[At]] = defaultdict(list)
    for place, things in many.items():
        for thing in set(things):
            homes[thing].append(place)
    return {thing: tuple(places) for thing, places in homes.items() if len(places) > 1}


def _told(check: str, homes: Homes, what: str, advice: str, *, passed: bool | None = False) -> list[Finding]:
    """Findings of things that stand in two splits of a node, and at two nodes."""
    within: dict[str, Counter[str]] = defaultdict(Counter)
    across: Counter[str] = Counter()
    for places in homes.values():
        names = sorted({node for node, _ in places})
        if len(names) > 1:
            across[" and ".join(f"{node} {split}" for node, split in places[:3])] += 1
        else:
            within[names[0]][" and ".join(split for _, split in places)] += 1
    said = {name: f"{pairs.total()} {what} in two splits ({_most(pairs)}): {advice}" for name, pairs in within.items()}
    found = each(check, passed, said)
    if across:
        found.append(Finding(check, passed, f"{across.total()} {what} at two nodes ({_most(across)}): {advice}"))
    return found


def _most(pairs: Counter[str]) -> str:
    return some([f"{where}: {count}" for where, count in pairs.most_common()], 3)


def digests(rows: Rows, columns: Sequence[str] | None = None) -> list[bytes]:
    """A hash of the bytes of each row, over the columns named or over all of them."""
    arrays = [np.ascontiguousarray(rows[name]) for name in columns or sorted(rows)]
    found = []
    for i in range(num_rows(rows)):
        row = hashlib.blake2b(digest_size=16)
        for array in arrays:
            row.update(array[i].tobytes())
        found.append(row.digest())
    return found
