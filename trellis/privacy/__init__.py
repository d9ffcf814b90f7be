"""Differential privacy, the pure parts: what was spent (`accountant`), what may never be forgotten (`ledger`), noise on
an aggregate (`central`), and noise that nodes share under secure aggregation (`discrete`)."""
