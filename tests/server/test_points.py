from __future__ import annotations

import math
from dataclasses import replace

from server import points
from trellis.types import Refusal, RoundRecord

RECORD = RoundRecord(
    run="r",
    round=3,
    purpose="train",
    started_at=0.0,
    base_digest="a",
    digest="b",
    asked=("n1", "n2", "n3"),
    answered=("n1", "n2"),
    refusals=(Refusal("n3", "policy.sector", "no"),),
    base_metrics={"val/ap": 0.5, "train/loss": 0.2},
    node_metrics={"n1": {"val/ap": 0.4, "train/loss": 0.1}, "n2": {"val/ap": 0.6}},
    num_examples={"n1": 10, "n2": 20},
    update_norms={"n1": 1.0, "n2": 3.0},
    weights={"n1": 1.0, "n2": 1.0},
    aggregate_norm=1.5,
    epsilon={"n1": 0.5, "n2": 0.75},
    findings={"suspicion/n3": 0.9},
    bytes_up=100,
    bytes_down=200,
    seconds={"collect": 0.25},
)


def values(many: list[points.Point]) -> dict[tuple[str, int], float]:
    return {(p.key, p.step): p.value for p in many}


def test_metrics_of_the_base_stand_at_the_round_that_made_it() -> None:
    assert values(points.of_version(RECORD)) == {
        ("val/ap", 2): 0.5,
        ("nodes/ap_min", 2): 0.4,
        ("nodes/ap_p50", 2): 0.5,
        ("nodes/ap_max", 2): 0.6,
    }
    assert [p.key for p in points.of_version(RECORD) if p.of_version] == ["val/ap"]


def test_everything_else_stands_at_the_round() -> None:
    assert values(points.of_round(RECORD)) == {
        ("train/loss", 3): 0.2,
        ("round/num_asked", 3): 3.0,
        ("round/num_answered", 3): 2.0,
        ("round/closed", 3): 0.0,
        ("round/seconds_collect", 3): 0.25,
        ("comm/bytes_up", 3): 100.0,
        ("comm/bytes_down", 3): 200.0,
        ("comm/stragglers", 3): 0.0,
        ("refusals/total", 3): 1.0,
        ("refusals/policy_sector", 3): 1.0,
        ("update/aggregate_norm", 3): 1.5,
        ("update/norm_p50", 3): 2.0,
        ("update/norm_max", 3): 3.0,
        ("privacy/epsilon_max", 3): 0.75,
        ("suspicion/n3", 3): 0.9,
    }


def test_a_node_has_its_own_values_and_whether_it_was_refused() -> None:
    assert values(points.of_node(RECORD, "n1")) == {
        ("val/ap", 2): 0.4,
        ("train/loss", 3): 0.1,
        ("update/norm", 3): 1.0,
        ("update/weight", 3): 1.0,
        ("num_examples", 3): 10.0,
        ("privacy/epsilon", 3): 0.5,
        ("refused", 3): 0.0,
    }
    assert values(points.of_node(RECORD, "n3")) == {("refused", 3): 1.0}
    assert points.node_table(RECORD)["nodes"]["n2"]["val/ap"] == 0.6


def test_a_detector_gives_every_node_its_evidence_and_whether_it_is_out() -> None:
    record = replace(
        RECORD,
        asked=("n1", "n2"),
        refusals=(),
        findings={"suspicion/num_quarantined": 1.0, "suspicion/max": 2.5, "suspicion/num_flagged": 0.0},
        suspicion={"n1": 2.5, "n3": 11.6},
        quarantined={"n3": "flagged in 4 of 4 rounds"},
    )
    assert points.nodes_of(record) == ["n1", "n2", "n3"]
    of_nodes = {n: values(points.of_node(record, n)) for n in points.nodes_of(record)}
    assert (of_nodes["n1"]["suspicion", 3], of_nodes["n1"]["quarantined", 3]) == (2.5, 0.0)
    assert of_nodes["n2"]["quarantined", 3] == 0.0
    assert ("suspicion", 3) not in of_nodes["n2"], "it was never judged"
    assert of_nodes["n3"] == {("suspicion", 3): 11.6, ("quarantined", 3): 1.0, ("refused", 3): 0.0}
    federation = values(points.of_round(record))
    assert [federation[f"suspicion/{key}", 3] for key in ("num_quarantined", "max", "num_flagged")] == [1.0, 2.5, 0.0]
    assert ("quarantined", 3) not in values(points.of_node(RECORD, "n1")), "there is no detector"


def test_nan_is_kept_and_an_infinity_is_not_sent() -> None:
    record = replace(RECORD, base_metrics={"val/ap": math.nan, "val/loss": math.inf, "train/loss": -math.inf})
    sent = {p.key: p.value for p in (*points.of_version(record), *points.of_round(record))}
    assert math.isnan(sent["val/ap"])
    assert not {"val/loss", "train/loss"} & set(sent)


def test_keys_are_made_fit_for_mlflow() -> None:
    assert points.clean("suspicion/банк @1=[x]") == "suspicion/банк _1__x_"
    assert points.clean("../a//b/./c") == "a/b/c"
    assert points.clean("..") == "_"
    assert len(points.clean("x" * 400)) == 250
