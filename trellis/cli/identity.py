"""A node's identity key, made at its own site.

trellis identity new bank-a.key     a new private key in a file that nobody else can read; it never leaves the site
trellis identity show bank-a.key    the public key, and its fingerprint to compare with the other members by telephone
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from trellis import identity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("new", "show"))
    parser.add_argument("file", type=Path, metavar="FILE", help="the private key, a PEM file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    key = identity.generate(arguments.file) if arguments.action == "new" else identity.load(arguments.file)
    public, mark = key.public_key.hex(), identity.fingerprint(key.public_key)
    if arguments.json:
        print(json.dumps({"file": str(arguments.file), "public_key": public, "fingerprint": mark}))
        return 0
    print(f"private key  {arguments.file}")
    print(f"public key   {public}")
    print(f"fingerprint  {' '.join(mark[i : i + 8] for i in range(0, 32, 8))} ...")
    if arguments.action == "new":
        print("\nGive every member the public key, compare fingerprints by another way, and list theirs in your")
        print("members file (docs/secure-aggregation.md).")
    return 0
