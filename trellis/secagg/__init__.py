"""Secure aggregation: a server learns the sum of its members' vectors, and nothing else.

    member       a node's half: every check before anything leaves
    consent      what its site allows, and what it remembers
    leader       a server's half of an epoch: keys, shares, the set
    tally        its half of a round: the sum, unmasked
    messages     what travels between them
    transcript   what is hashed and signed
    prg, shamir, quantise, counts, keys, graph, dealt, draws, roster, statements, tolerance: the parts

Pure: numpy and the `cryptography` package.  docs/secure-aggregation.md says what it guarantees, and what not.
"""
