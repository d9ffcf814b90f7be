"""The member's half: one class, one method a message, every check before anything leaves.

Bonawitz et al., Practical secure aggregation, CCS 2017 (https://eprint.iacr.org/2017/281), figure 4 with the parts for
active adversaries; their rounds 0 and 1 are done ahead for every key index of an epoch.  Where a check fails the member
says so (`SecAggError`) and reveals nothing; what was told already it tells again, byte for byte.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trellis import identity
from trellis.errors import SecAggError
from trellis.identity import IdentityKey
from trellis.identity import Member as Pin
from trellis.secagg import (
    consent,
    dealt,
    draws,
    epoch,
    graph,
    keys,
    messages,
    prg,
    roster,
    shamir,
    statements,
    tolerance,
    transcript,
)
from trellis.secagg.consent import DENIED, Journal, Terms
from trellis.secagg.draws import Draw
from trellis.secagg.epoch import Epoch
from trellis.secagg.messages import (
    AskConfirm,
    AskDraw,
    AskKeys,
    AskName,
    AskReveal,
    AskShares,
    AskSurvivors,
    AskUnmask,
    Committed,
    Confirmation,
    Confirmed,
    Keys,
    Named,
    Revealed,
    Shares,
    Stage,
    Survivors,
    Unmasked,
)
from trellis.secagg.statements import COUNTS, UPDATE, Published, Words
from trellis.secagg.transcript import Signed
from trellis.types import Masking, Request, Threat


@dataclass(slots=True)
class Member:
    """A node in secure aggregation.  `epoch` and `draw` are what it remembers from one message to the next."""

    name: str
    key: IdentityKey
    pins: Mapping[str, Pin]
    """Members that its own site accepts, itself among them."""
    terms: Terms
    journal: Journal
    epoch: Epoch | None = None
    draw: Draw | None = None
    random_bytes: Callable[[int], bytes] = field(default=secrets.token_bytes)

    def answer(self, question: Stage) -> Stage:
        """The reply to one question of the server, besides requests.  Raises SecAggError; nothing is lost then."""
        asked = question.digest
        known = self.epoch
        if known is not None and known.asked == asked:
            return messages.from_fields(_reply_to(question), _unpacked(known.answer))
        handlers: dict[type[Stage], Callable[..., Stage]] = {
            AskName: self._say_name,
            AskDraw: self._commit,
            AskReveal: self._reveal,
            AskKeys: self._advertise,
            AskShares: self._deal,
            AskConfirm: self._confirm,
            AskSurvivors: self._survived,
            AskUnmask: self._unmask,
        }
        reply = handlers[type(question)](question)
        if self.epoch is not None and not isinstance(question, AskName | AskDraw | AskReveal):
            self.epoch.asked, self.epoch.answer = asked, _packed(reply)
        return reply

    def _say_name(self, asked: AskName) -> Named:
        """Its name, signed with what the server asked, so that nobody else can say it."""
        signed = transcript.sign(self.key, "hello", {"node": self.name, "nonce": asked.nonce[:64].hex()})
        return Named(self.name, signed.payload, signed.signature)

    # ------------------------------------------------------------ drawing groups

    def _commit(self, asked: AskDraw) -> Committed:
        """A commitment to a number, where all members this site accepts take part."""
        told = (asked.run, asked.epoch, list(asked.names), asked.group_size)
        again = self.draw is not None and told == (
            self.draw.run,
            self.draw.epoch,
            self.draw.names,
            self.draw.group_size,
        )
        if not again:
            if not 1 <= asked.group_size <= len(asked.names):
                raise SecAggError(DENIED, f"groups of {asked.group_size} among {len(asked.names)} members")
            if asked.names != roster.pool(self.name, {**self.pins, self.name: self._pin(self.name)}):
                raise SecAggError(DENIED, "groups are drawn among all members that are pinned, and no others")
            consent.require_few_draws(self.journal, self.terms, asked.epoch)
            self.journal.add({"fact": "drew", "run": asked.run, "epoch": asked.epoch})
            self.draw = Draw(asked.run, asked.epoch, list(asked.names), asked.group_size, self.random_bytes(32))
        assert self.draw is not None
        commitment = draws.commitment(self.draw.run, self.draw.epoch, self.name, self.draw.number)
        fields = {
            "run": asked.run,
            "epoch": asked.epoch,
            "node": self.name,
            "group_size": asked.group_size,
            "commitment": commitment.hex(),
        }
        signed = transcript.sign(self.key, "commit", fields)
        return Committed(signed.payload, signed.signature)

    def _reveal(self, asked: AskReveal) -> Revealed:
        """The number, once everybody's commitments are known; to one set of commitments only."""
        draw = self.draw
        if draw is None or draw.epoch != asked.epoch:
            raise SecAggError(DENIED, "no such draw")
        commits = messages.signed_by(asked.names, asked.payloads, asked.signatures)
        if not set(commits) <= set(draw.names):
            raise SecAggError(DENIED, "a commitment of somebody who takes no part in the draw")
        for name, commit in commits.items():
            draws.committed(self._pin(name), draw, commit)
        own = transcript.parsed(commits[self.name].payload, "commit") if self.name in commits else {}
        if own.get("commitment") != draws.commitment(draw.run, draw.epoch, self.name, draw.number).hex():
            raise SecAggError(DENIED, "its own commitment is not among them")
        listed = draws.commits_digest(commits)
        if draw.commits not in (b"", listed):
            raise SecAggError(DENIED, "its number was revealed to other commitments")
        draw.commits = listed
        fields = {"commits": listed.hex(), "epoch": draw.epoch, "node": self.name, "number": draw.number.hex()}
        signed = transcript.sign(self.key, "reveal", fields)
        return Revealed(signed.payload, signed.signature)

    def _drawn_group(self, asked: AskKeys) -> tuple[str, ...]:
        """The group this member is in by everybody's signed numbers.  Raises SecAggError where they do not give one."""
        draw = self.draw
        if draw is None or (draw.run, draw.epoch) != (asked.run, asked.epoch):
            raise SecAggError(DENIED, "no such draw")
        size, rest = divmod(len(asked.draw), len(asked.drawn_names) or 1)
        if rest or size != 4:
            raise SecAggError("wrong_records", "a draw needs four entries a member")
        entries = {name: asked.draw[4 * i : 4 * i + 4] for i, name in enumerate(asked.drawn_names)}
        commits = {name: Signed(e[0], e[1]) for name, e in entries.items()}
        if self.name not in entries or draws.commits_digest(commits) != draw.commits:
            raise SecAggError(DENIED, "the commitments are not those it revealed its number to")
        withheld = [name for name, e in entries.items() if not e[2]]
        missing = sorted(set(draw.names) - set(entries)) + withheld
        if missing and asked.threat == Threat.malicious_server:
            raise SecAggError(DENIED, f"{len(missing)} members have no number in the draw: it is void")
        numbers = {
            name: draws.number_in(self._pin(name), draw, Signed(e[2], e[3]), commits[name])
            for name, e in entries.items()
            if e[2]
        }
        if numbers.get(self.name) != draw.number:
            raise SecAggError(DENIED, "its own number is not among them")
        seed = roster.drawn_seed(asked.run, asked.epoch, numbers)
        owners = [(name, self.pins[name].organisation) for name in numbers]
        return next(group for group in roster.dealt_out(owners, draw.group_size, seed) if self.name in group)

    # ------------------------------------------------------------ offline

    def _advertise(self, asked: AskKeys) -> Keys:
        """New keys for an epoch, where the group is the one its site has pinned, or the one that was drawn."""
        drawn = bool(asked.drawn_names)
        group = self._drawn_group(asked) if drawn else roster.pinned_group(self._pin(self.name).group, self.pins)
        self._require_roster(asked, group)
        if self.epoch is not None and self.epoch.epoch == asked.epoch:
            raise SecAggError(DENIED, "this epoch was begun with other members or settings")
        if drawn:
            consent.require_few_groups(self.journal, self.terms, group)
        peers = roster.peers(asked)[self.name]
        transport = {name: keys.generate() for name in peers}
        mask = [keys.generate() for _ in range(asked.num_keys)]
        seeds = [self.random_bytes(keys.KEY_BYTES) for _ in range(asked.num_keys)]
        fields = {
            "roster": asked.roster.hex(),
            "node": self.name,
            "transport": {name: public.hex() for name, (_, public) in transport.items()},
            "mask": [public.hex() for _, public in mask],
            "seeds": [statements.seed_hash(asked.roster, self.name, i, seed).hex() for i, seed in enumerate(seeds)],
        }
        signed = transcript.sign(self.key, "keys", fields)
        self.epoch = Epoch(
            run=asked.run,
            epoch=asked.epoch,
            group=asked.group,
            roster=asked.roster,
            names=list(asked.names),
            threat=asked.threat,
            quorum=asked.quorum,
            threshold=asked.threshold,
            num_neighbours=asked.num_neighbours,
            num_keys=asked.num_keys,
            drawn=drawn,
            peers=list(peers),
            stage=epoch.KEYS,
            mask_secrets=b"".join(private for private, _ in mask),
            seeds=b"".join(seeds),
            transport={name: private for name, (private, _) in transport.items()},
            statements={self.name: signed.digest},
        )
        return Keys(signed.payload, signed.signature)

    def _require_roster(self, asked: AskKeys, group: Sequence[str]) -> None:
        """Every check of who takes part and how many of them must.  Raises SecAggError."""
        terms, names = self.terms, list(asked.names)
        if names != sorted(set(names)) or self.name not in names:
            raise SecAggError(DENIED, "the group's names are not in order, once each, this node's among them")
        if names != sorted(group):
            raise SecAggError(
                DENIED, f"the group has {len(names)} members and is not the whole group of {len(group)} it must be"
            )
        known = [(self._pin(name).organisation, identity.fingerprint(self._pin(name).public_key)) for name in names]
        claimed = [*zip(asked.organisations, asked.fingerprints, strict=False)]
        whole = len(asked.organisations) == len(asked.fingerprints) == len(names)
        if known != claimed or not whole:
            raise SecAggError(DENIED, "a member's key or organisation is not the one that is pinned")
        if not asked.drawn_names and asked.group != self._pin(self.name).group:
            raise SecAggError(DENIED, f"the group is called {asked.group[:40]!r}, not as it is pinned")
        threat = self._threat(asked.threat)
        least = tolerance.least_threshold(threat, len(names))
        if not least <= asked.quorum <= len(names):
            raise SecAggError(
                DENIED, f"quorum {asked.quorum}: {len(names)} members under {threat} need {least} at least"
            )
        self._require_neighbours(asked, threat)
        self._require_organisations(names)
        if roster.crowded(names, self.pins) > terms.max_per_organisation:
            raise SecAggError(DENIED, f"more than {terms.max_per_organisation} members of one organisation in a group")
        if not 1 <= asked.num_keys <= terms.max_keys:
            raise SecAggError(DENIED, f"{asked.num_keys} keys for an epoch, the site allows {terms.max_keys}")

    def _require_neighbours(self, asked: AskKeys, threat: Threat) -> None:
        """Enough of them, and enough shares to give a secret back.  Raises SecAggError."""
        n, k = len(asked.names), asked.num_neighbours
        if k == 0:
            if asked.threshold != asked.quorum:
                raise SecAggError(DENIED, "quorum and threshold differ where all members share with each other")
            return
        if threat is Threat.malicious_server:
            raise SecAggError(DENIED, "threat=malicious_server needs a group whose members all share with each other")
        found = graph.degree(n, colluding=self.terms.colluding, dropping=self.terms.dropping)
        if found is None or not found[0] <= k < n - 1:
            needed = "all others" if found is None else f"{found[0]} at least"
            raise SecAggError(DENIED, f"{k} neighbours among {n} members: {needed} are needed")
        # + 1: for odd n and k one member has a neighbour more
        if not tolerance.least_threshold(threat, k + 1) <= asked.threshold <= k:
            raise SecAggError(DENIED, f"threshold {asked.threshold} among {k} neighbours")

    def _threat(self, asked: str) -> Threat:
        try:
            threat = Threat(asked)
        except ValueError as error:
            raise SecAggError(DENIED, f"there is no threat {asked[:40]!r}") from error
        if not threat.at_least(self.terms.least_threat):
            raise SecAggError(DENIED, f"threat={threat}, the site asks for {self.terms.least_threat} at least")
        if threat is Threat.malicious_server and not self.terms.code_is_pinned:
            raise SecAggError(
                DENIED,
                "threat=malicious_server means nothing at a site that runs whatever code the server sends: start the "
                "node so that it checks the code, or set least_threat: semi_honest in its own policy",
            )
        return threat

    def _deal(self, asked: AskShares) -> Shares:
        """Shares of every secret, encrypted to each peer whose keys are good."""
        e = self._at(asked.epoch, epoch.KEYS)
        everyone = self._members(asked.names, asked.digests, e)
        self._require_enough(asked.names, e)
        told = messages.signed_by(asked.peers, asked.payloads, asked.signatures)
        expected = sorted({*e.peers, self.name} & set(asked.names))
        if sorted(told) != expected:
            raise SecAggError(DENIED, "the keys are not those of its peers and itself")
        published: dict[str, Published] = {}
        for name, signed in told.items():
            if everyone[name] != signed.digest:
                raise SecAggError(DENIED, f"two statements of {name} about its keys")
            published[name] = statements.read_keys(
                signed, self._pin(name), e.roster, self._peers_of(name, e), e.num_keys
            )
        if told[self.name].digest != e.statements[self.name]:
            raise SecAggError(DENIED, "its own keys were replaced")
        statements.require_distinct(published)
        e.keys_digest = transcript.set_digest(e.roster, asked.names, asked.digests)
        e.keyed = list(asked.names)
        e.statements = everyone  # strangers' too: a complaint may be theirs
        e.mask_keys = {name: b"".join(p.mask) for name, p in published.items() if name != self.name}
        reply = self._dealt(e, published)
        e.stage = epoch.SHARES
        return reply

    def _dealt(self, e: Epoch, published: Mapping[str, Published]) -> Shares:
        own = self.name in self._holders_of(self.name, e)
        holders = [name for name in sorted(published) if own or name != self.name]
        if len(holders) < e.threshold:
            raise SecAggError(DENIED, f"{len(holders)} members would have shares, {e.threshold} are needed")
        at = roster.points(e.names)
        by_holder = statements.split_secrets(e.seeds, e.mask_secrets, [at[name] for name in holders], e.threshold)
        if own:
            e.shares = {self.name: by_holder[holders.index(self.name)]}
        ephemeral, lists, sealed, hashes = {}, {}, [], []
        for holder, shares in zip(holders, by_holder, strict=True):
            ciphertext = b""
            if holder != self.name:
                public = published[holder].transport[self.name]
                ephemeral[holder], ciphertext = dealt.seal(e.roster, self.name, holder, public, shares)
            signed_hashes = dealt.hashes_of(e.roster, self.name, holder, shares)
            lists[holder] = dealt.dealt_digest(ciphertext, signed_hashes).hex()
            sealed.append(ciphertext)
            hashes.append(signed_hashes)
        fields = {
            "roster": e.roster.hex(),
            "node": self.name,
            "keys": e.keys_digest.hex(),
            "ephemeral": {name: public.hex() for name, public in ephemeral.items()},
            "lists": lists,
        }
        signed = transcript.sign(self.key, "shares", fields)
        return Shares(signed.payload, signed.signature, tuple(holders), tuple(sealed), tuple(hashes))

    def _confirm(self, asked: AskConfirm) -> Confirmed:
        """A signature over the set of members, or complaints of those who dealt this member something wrong."""
        e = self._at(asked.epoch, epoch.SHARES, epoch.CONFIRMED)
        everyone = self._members(asked.names, asked.digests, e)
        self._require_enough(asked.names, e)
        told = messages.signed_by(asked.dealers, asked.payloads, asked.signatures)
        expected = sorted(({*e.peers} & set(asked.names) & set(e.statements)) - {self.name})
        if not set(asked.names) <= set(e.keyed):
            raise SecAggError(DENIED, "a member of the set has no keys that were good")
        if sorted(told) != expected or not len(asked.dealers) == len(asked.ciphertexts) == len(asked.hashes):
            raise SecAggError(DENIED, "what is there is not of every peer in the set")
        if e.stage == epoch.CONFIRMED:
            self._require_justified(e, asked)
        complaints = self._opened(e, asked, told, everyone)
        if complaints:
            return Confirmed(b"", b"", tuple(part for c in complaints for part in (c.payload, c.signature)))
        e.confirmed = transcript.set_digest(e.roster, asked.names, asked.digests)
        e.members, e.certified, e.stage = list(asked.names), False, epoch.CONFIRMED
        e.transport = {}  # nobody can make this member reveal them any more
        signed = transcript.sign(self.key, "confirm", {"roster": e.roster.hex(), "set": e.confirmed.hex()})
        return Confirmed(signed.payload, signed.signature)

    def _opened(
        self, e: Epoch, asked: AskConfirm, told: Mapping[str, Signed], everyone: Mapping[str, bytes]
    ) -> list[Signed]:
        """Take what was dealt, or complain.  What the server tampered with is its fault, and nothing is revealed."""
        complaints = []
        for name, ciphertext, hashes in zip(asked.dealers, asked.ciphertexts, asked.hashes, strict=True):
            signed = told[name]
            if everyone[name] != statements.both_digest(e.statements[name], signed.digest):
                raise SecAggError(DENIED, f"two statements of {name} about what it dealt")
            fields = transcript.read(
                signed, "shares", self._pin(name).public_key, roster=e.roster.hex(), node=name, keys=e.keys_digest.hex()
            )
            if transcript.entry(fields, "lists", self.name, dealt.HASH_BYTES) != dealt.dealt_digest(ciphertext, hashes):
                raise SecAggError(DENIED, f"what {name} dealt was changed, or is missing")
            if e.stage == epoch.CONFIRMED:
                continue  # opened already, and the key is erased
            public = transcript.entry(fields, "ephemeral", self.name, keys.KEY_BYTES)
            private = e.transport[name]
            try:
                e.shares[name] = dealt.opened(
                    e.roster,
                    name,
                    self.name,
                    private=private,
                    public=public,
                    ciphertext=ciphertext,
                    hashes=hashes,
                    num_keys=e.num_keys,
                )
            except SecAggError:
                complaint = {"roster": e.roster.hex(), "node": self.name, "against": name, "secret": private.hex()}
                complaints.append(transcript.sign(self.key, "complaint", complaint))
        return complaints

    def _require_justified(self, e: Epoch, asked: AskConfirm) -> None:
        """A member that has signed a set signs a smaller one only where complaints prove each one's guilt."""
        pins = {name: self._pin(name) for name in e.names}
        guilty = {
            dealt.judge(found, e.roster, pins, e.num_keys, keys_digest=e.keys_digest, known=e.statements)[0]
            for found in dealt.evidence_in(asked.evidence)
        }
        gone = set(e.members) - set(asked.names)
        if not set(asked.names) <= set(e.members) or not gone <= guilty:
            raise SecAggError(DENIED, f"{len(gone - guilty)} members are missing without a proven complaint")

    # ------------------------------------------------------------ a round

    def require_maskable(self, request: Request, confirmation: Confirmation) -> None:
        """Every check of a request, before anything is trained for it.  Raises SecAggError.

        What is in the node's rows decides nothing here, nor after: a refusal would tell something of them.
        """
        masking, index = request.masking, request.key_index
        if masking is None:
            raise SecAggError(DENIED, "the request asks for no masking")
        e = self._at(masking.epoch, epoch.CONFIRMED)
        if index is None or not 0 <= index < e.num_keys or index in e.masked:
            raise SecAggError(DENIED, f"key index {index} is none of {e.num_keys} that are unused")
        told = (masking.group, masking.roster, masking.confirmed, list(masking.members), masking.quorum, request.run)
        if told != (e.group, e.roster.hex(), e.confirmed.hex(), e.members, e.quorum, e.run):
            raise SecAggError(DENIED, "the request is not about the set of members that this node confirmed")
        if self.name not in request.members:
            raise SecAggError(DENIED, "the request is not for this node")
        if len(masking.weights) != len(masking.members):
            raise SecAggError(DENIED, "every member must have a weight")
        consent.require_weights(self.terms, masking)
        self._require_enough(e.members, e, weights_of(masking))
        self._require_certified(e, confirmation)
        consent.require_new(
            self.journal,
            self.terms,
            run=e.run,
            epoch=e.epoch,
            index=index,
            base=consent.base_of(request),
            members=e.names,
            settings=consent.settings_of(request),
        )
        if e.drawn:
            consent.require_few_groups(self.journal, self.terms, e.names)

    def mask(self, request: Request, confirmation: Confirmation, update: Words, counts: Words) -> Signed:
        """Add this member's masks to both vectors, in place, and sign what comes out.

        The key index is used up before anything leaves.  Raises SecAggError.
        """
        self.require_maskable(request, confirmation)
        masking, index = request.masking, request.key_index
        assert masking is not None and index is not None  # noqa: PT018
        e, base, asked = self._at(masking.epoch, epoch.CONFIRMED), consent.base_of(request), request.digest
        # an older question about the same base is never answered now
        for old in [i for i, (_, about) in e.open.items() if about == base]:
            self._close(e, int(old))
        self.journal.add(
            {
                "fact": "masked",
                "run": e.run,
                "epoch": e.epoch,
                "index": index,
                "purpose": base.partition(":")[0],
                "base": base,
                "members": e.names,
                "drawn": e.drawn,
                "settings": consent.settings_of(request),
            }
        )
        e.asked, e.answer = b"", b""  # what was told of the round before is told no more
        masks = self._masks(e, index, asked)
        prg.add_masks(update, masks, region=UPDATE)
        prg.add_masks(counts, masks, region=COUNTS)
        e.masked.append(index)
        e.open[str(index)] = [asked, base]
        e.weights[str(index)] = weights_of(masking)
        e.mask_secrets = epoch.erased(e.mask_secrets, index, keys.KEY_BYTES)
        e.seeds = epoch.erased(e.seeds, index, keys.KEY_BYTES)
        return transcript.sign(
            self.key, "masked", statements.masked_fields(e.roster, index, asked, self.name, update, counts)
        )

    def _masks(self, e: Epoch, index: int, request: str) -> list[tuple[bytes, int]]:
        """Its own mask, and one in common with every peer of the set: the greater name takes it away."""
        at = slice(index * keys.KEY_BYTES, (index + 1) * keys.KEY_BYTES)
        private = e.mask_secrets[at]
        masks = [(statements.self_mask(e.roster, index, request, self.name, e.seeds[at]), 1)]
        for peer in sorted(set(e.mask_keys) & set(e.members)):
            key = statements.pair_mask(e.roster, index, request, self.name, peer, private, e.mask_keys[peer][at])
            masks.append((key, 1 if self.name < peer else -1))
        return masks

    def _survived(self, asked: AskSurvivors) -> Survivors:
        """Its signature over the survivors of a request: over one set only."""
        e = self._at(asked.epoch, epoch.CONFIRMED)
        self._require_survivors(e, asked.key_index, asked.request, asked.survivors)
        found = statements.survivors_digest(e.roster, asked.key_index, asked.request, asked.survivors)
        if e.signed.setdefault(str(asked.key_index), found.hex()) != found.hex():
            raise SecAggError(DENIED, "it has confirmed other survivors of this request")
        signed = transcript.sign(self.key, "survivors", {"roster": e.roster.hex(), "survivors": found.hex()})
        return Survivors(signed.payload, signed.signature)

    def _unmask(self, asked: AskUnmask) -> Unmasked:
        """One share of each peer's secrets: of its seed where it survived, else of its mask key, never of both."""
        e = self._at(asked.epoch, epoch.CONFIRMED)
        self._require_survivors(e, asked.key_index, asked.request, asked.survivors)
        if Threat(e.threat) is Threat.malicious_server:
            self._require_agreed(e, asked)
        base = e.open[str(asked.key_index)][1]
        consent.require_same_survivors(
            self.journal, self.terms, run=e.run, members=e.names, base=base, survivors=asked.survivors
        )
        self.journal.add(
            {
                "fact": "answered",
                "run": e.run,
                "epoch": e.epoch,
                "base": base,
                "survivors": list(asked.survivors),
                "members": e.names,
                "drawn": e.drawn,
            }
        )
        dealers = sorted(set(e.shares) & set(e.members))
        alive = set(asked.survivors)
        shares = [
            statements.share_at(e.shares[d], asked.key_index, dealt.SEED if d in alive else dealt.KEY) for d in dealers
        ]
        self._close(e, asked.key_index)
        return Unmasked(tuple(dealers), tuple(shares))

    def _require_survivors(self, e: Epoch, index: int, request: str, survivors: Sequence[str]) -> None:
        if e.open.get(str(index), ["", ""])[0] != request:
            raise SecAggError(DENIED, f"key index {index} waits for no such request")
        if list(survivors) != sorted(set(survivors)) or not set(survivors) <= set(e.members):
            raise SecAggError(DENIED, "the survivors are not members of the set, in order, once each")
        if self.name not in survivors:
            raise SecAggError(DENIED, "this node's vector is not in the sum")
        self._require_enough(survivors, e, e.weights.get(str(index), {}))

    def _require_agreed(self, e: Epoch, asked: AskUnmask) -> None:
        """Enough survivors have signed that these are the survivors."""
        found = statements.survivors_digest(e.roster, asked.key_index, asked.request, asked.survivors)
        if e.signed.get(str(asked.key_index), found.hex()) != found.hex():
            raise SecAggError(DENIED, "it has confirmed other survivors of this request")
        signatures = messages.signed_by(asked.signers, asked.payloads, asked.signatures)
        agreed = self._signers(signatures, "survivors", set(asked.survivors), e, survivors=found.hex())
        if agreed < e.quorum:
            raise SecAggError(DENIED, f"{agreed} members confirmed these survivors, {e.quorum} are needed")

    def _require_certified(self, e: Epoch, confirmation: Confirmation) -> None:
        """Enough members have signed the set that this node has signed."""
        if e.certified:
            return
        signatures = messages.signed_by(confirmation.names, confirmation.payloads, confirmation.signatures)
        # a thousand signatures would take longer than masking: there the neighbours', whose masks are in common
        among = {*e.peers, self.name} & set(e.members) if e.num_neighbours else set(e.members)
        agreed = self._signers(signatures, "confirm", among, e, set=e.confirmed.hex())
        needed = e.threshold if e.num_neighbours else e.quorum
        if agreed < needed:
            raise SecAggError(DENIED, f"{agreed} members confirmed the set, {needed} are needed")
        e.certified = True

    def _signers(self, signatures: Mapping[str, Signed], kind: str, among: set[str], e: Epoch, **said: str) -> int:
        """How many of these members signed it.  Signatures that are not good count as none."""
        good = 0
        for name in sorted(set(signatures) & among):
            try:
                transcript.read(signatures[name], kind, self._pin(name).public_key, roster=e.roster.hex(), **said)
            except SecAggError:
                continue
            good += 1
        return good

    # ------------------------------------------------------------ what every step looks at

    def _at(self, asked: str, *stages: int) -> Epoch:
        if self.epoch is None or self.epoch.epoch != asked:
            raise SecAggError(DENIED, "no such epoch here: its secrets are gone with the process that had them")
        if self.epoch.stage not in stages:
            raise SecAggError(DENIED, f"out of turn: this node is at step {self.epoch.stage} of the epoch")
        return self.epoch

    def _pin(self, name: str) -> Pin:
        if name not in self.pins:
            raise SecAggError(DENIED, f"{name[:60]} is no member that this site has pinned")
        return self.pins[name]

    def _members(self, names: Sequence[str], digests: Sequence[bytes], e: Epoch) -> dict[str, bytes]:
        """Digests by member of a set that is in order and within the group."""
        if list(names) != sorted(set(names)) or not set(names) <= set(e.names) or len(names) != len(digests):
            raise SecAggError(DENIED, "the set is not members of the group, in order, once each")
        if self.name not in names:
            raise SecAggError(DENIED, "this node is not in the set")
        return dict(zip(names, digests, strict=True))

    def _require_enough(self, names: Sequence[str], e: Epoch, weights: Mapping[str, int] | None = None) -> None:
        """Enough members, of enough organisations, for each of them to be hidden among the others."""
        if weights:
            names = consent.require_shared_weight(self.terms, weights, names)
        if len(names) < e.quorum:
            raise SecAggError(DENIED, f"{len(names)} members, {e.quorum} are needed")
        self._require_organisations(names)

    def _require_organisations(self, names: Iterable[str]) -> None:
        found = roster.organisations(names, self.pins)
        if found < self.terms.min_group:
            raise SecAggError(DENIED, f"{found} organisations, the site asks for {self.terms.min_group} behind a sum")

    def _holders_of(self, name: str, e: Epoch) -> set[str]:
        """Who holds shares of a member's secrets: everybody, or its peers in a sparse graph."""
        return set(self._peers_of(name, e)) if e.num_neighbours else set(e.names)

    def _peers_of(self, name: str, e: Epoch) -> tuple[str, ...]:
        return roster.peers_of(tuple(e.names), e.num_neighbours, e.roster)[name]

    def _close(self, e: Epoch, index: int) -> None:
        """Forget everything of a key index: it is never answered for again."""
        e.open.pop(str(index), None)
        e.weights.pop(str(index), None)
        size = 2 * shamir.SHARE_BYTES
        e.shares = {name: epoch.erased(shares, index, size) for name, shares in e.shares.items()}


def weights_of(masking: Masking) -> dict[str, int]:
    """The members' weights in a sum; none where all are the same."""
    return dict(zip(masking.members, masking.weights, strict=True)) if len(set(masking.weights)) > 1 else {}


# ---------------------------------------------------------------- the last answer


def _packed(reply: Stage) -> bytes:
    """A reply as bytes, to be told again."""
    parts: list[bytes] = []
    head: list[tuple[str, str, list[int]]] = []
    for name, value in messages.fields_of(reply).items():
        items = value if isinstance(value, list) else [value]
        encoded = [item if isinstance(item, bytes) else str(item).encode() for item in items]
        kind = ("list " if isinstance(value, list) else "") + (type(items[0]).__name__ if items else "bytes")
        head.append((name, kind, [len(item) for item in encoded]))
        parts += encoded
    return json.dumps(head).encode() + b"\n" + b"".join(parts)


def _unpacked(data: bytes) -> messages.Fields:
    """Inverse of `_packed`."""
    head, _, rest = data.partition(b"\n")
    values: messages.Fields = {}
    at = 0
    for name, kind, sizes in json.loads(head):
        items: list[Any] = []
        for size in sizes:
            item = rest[at : at + size]
            at += size
            items.append(item if kind.endswith("bytes") else item.decode() if kind.endswith("str") else int(item))
        values[name] = items if kind.startswith("list ") else items[0]
    return values


def _reply_to(question: Stage) -> type[Stage]:
    return next(kind for kind in messages.REPLIES if kind.stage == question.stage)
