"""Shapes of the rows; and the model on them: no hidden state, and outputs, losses and counts as announced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from experiments.readiness.federation import Federation, evenly
from experiments.readiness.findings import MODEL, SHAPES, Finding, each, failures, some
from sectors.base import SPLITS, Rows, Sector, num_rows, take, to_batch
from sectors.params import reproducible
from trellis.types import Counts
from trellis.vectors import CountSpec

FEW = 7
"""Rows that are enough to see whether one depends on another."""
MEASURED = 2000
"""Rows that are enough to try the counts on."""
TOLERANCE = 1e-9
"""Of sums of floats, relative: their order may differ."""
CPU = torch.device("cpu")


def check_shapes(f: Federation) -> list[Finding]:
    """All splits of all nodes have the same columns, trailing shapes and dtypes."""
    first, odd = f.nodes[0], {}
    needed = _layout(first.data.train)
    if "x" not in needed:
        return [Finding(SHAPES, False, f"the rows have no `x`, only {', '.join(needed)}")]
    for node in f.nodes:
        for split in SPLITS:
            rows = node.data.split(split)
            lengths = {len(v) for v in rows.values()}
            if len(lengths) > 1:
                odd[node.name] = f"{split} has columns of lengths {sorted(lengths)}: needed is one length"
            elif (here := _layout(rows)) != needed:
                odd[node.name] = f"{split} has {_laid(here)}; train of {first.name} has {_laid(needed)}"
    return each(SHAPES, False, odd) or [Finding(SHAPES, True, f"every split of every node has {_laid(needed)}")]


def _layout(rows: Rows) -> dict[str, tuple[tuple[int, ...], str]]:
    return {k: (v.shape[1:], v.dtype.name) for k, v in sorted(rows.items())}


def _laid(layout: Mapping[str, tuple[tuple[int, ...], str]]) -> str:
    return ", ".join(f"{k} (n{''.join(f', {s}' for s in shape)}) {dtype}" for k, (shape, dtype) in layout.items())


def check_model(f: Federation) -> list[Finding]:
    problems = _model_problems(f.sector, f)
    if not problems and (fitted := _fitted(f)) is not f.sector:
        problems = [f"{said} (with what is fitted)" for said in _model_problems(fitted, f)]
    if problems:
        return failures(MODEL, problems)
    model = _built(f.sector)
    params = sum(p.numel() for p in model.parameters())
    said = f"{params} params, no hidden state; outputs, losses and counts are one a row, finite and as announced"
    given = f.sector.metrics(_counts(f.sector, model, _measured(f)))
    left_out = sorted({spec.name for spec in f.sector.metric_specs} - given.keys())
    note = [Finding(MODEL, None, f"no {some(left_out)} on these rows: left out of `metrics`")] if left_out else []
    return [Finding(MODEL, True, said), *note]


def _built(sector: Sector) -> nn.Module:
    with reproducible(0):
        return sector.build_model()


def _fitted(f: Federation) -> Sector:
    """The sector as its statistics round would leave it, or as it is: what stops that round is a finding of its own."""
    try:
        return f.sector.fitted_on(f.split("train"))
    except Exception:
        return f.sector


def _model_problems(sector: Sector, f: Federation) -> list[str]:
    model = _built(sector)
    kept = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    inside = tuple(f"{name}." for name in kept)
    kept += [name for name, b in model.named_buffers() if b.is_floating_point() and not name.startswith(inside)]
    if kept:
        return [f"{some(kept)} keep what they saw of the rows between calls: use GroupNorm, and no floating buffers"]
    rows = next((r for split in SPLITS for n in f.nodes if num_rows(r := n.data.split(split))), {})
    rows = take(rows, evenly(num_rows(rows), FEW))
    return [
        *_output_problems(sector, model.eval(), rows),
        *_state_problems(sector, model.train(), rows),
        *_count_problems(sector, model, _measured(f)),
    ]


def _output_problems(sector: Sector, model: nn.Module, rows: Rows) -> list[str]:
    """What is wrong with outputs and losses of a few rows together, and of one alone."""
    losses = []
    for size in (1, num_rows(rows)):
        batch = to_batch(rows, slice(size), CPU)
        with reproducible(0):
            outputs = sector.forward(model, batch)
            loss = sector.losses(outputs, batch).detach()
        lengths = {"losses": tuple(loss.shape), "predict": (len(sector.predict(outputs)),)}
        if isinstance(outputs, torch.Tensor):
            lengths["outputs"] = tuple(outputs.shape[:1])
        if odd := {what: shape for what, shape in lengths.items() if shape != (size,)}:
            return [f"{what} of {size} rows have shape {shape}: needed is one a row" for what, shape in odd.items()]
        if not torch.isfinite(loss).all():
            return [f"losses are not finite for {int((~torch.isfinite(loss)).sum())} of {size} rows of a fresh model"]
        losses.append(loss[0])
    alone, among = losses
    if not torch.allclose(among, alone, rtol=1e-3, atol=1e-5):
        return ["the loss of a row changes with the other rows of its batch: needed is a loss a row"]
    return []


def _state_problems(sector: Sector, model: nn.Module, rows: Rows) -> list[str]:
    """What a model remembers from one call to the next."""
    batch, before, again = to_batch(rows, slice(None), CPU), _bytes_of(model), []
    for _ in range(2):
        with reproducible(0):
            again.append(sector.losses(sector.forward(model, batch), batch).detach())
    if _bytes_of(model) != before:
        return ["a forward pass changes the model's tensors: needed is a model without hidden state"]
    if not torch.equal(*again):
        return ["the same rows have other losses in a second call: something is kept between calls"]
    return []


def _bytes_of(model: nn.Module) -> list[bytes]:
    return [tensor.detach().numpy().tobytes() for tensor in model.state_dict().values()]


def _count_problems(sector: Sector, model: nn.Module, rows: Rows) -> list[str]:
    counts = _counts(sector, model, rows)
    if problems := spec_problems("counts", counts, sector.count_specs(), num_rows(rows)):
        return problems
    names = set(sector.metrics(counts))
    if unknown := names - {spec.name for spec in sector.metric_specs}:
        problems.append(f"metrics names {some(sorted(unknown))}, which `metric_specs` does not list")
    if sector.primary.name not in names:
        problems.append(f"metrics does not give the primary metric {sector.primary.name} of {num_rows(rows)} rows")
    zeros = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in sector.count_specs()}
    if told := {**sector.metrics({}), **sector.metrics(zeros)}:
        problems.append(f"metrics gives {some(sorted(told))} of no rows: needed is nothing")
    return problems


def _measured(f: Federation) -> Rows:
    """Some rows of the test splits; where there are none, of others."""
    rows = next((rows for split in reversed(SPLITS) if num_rows(rows := f.split(split))), {})
    return take(rows, evenly(num_rows(rows), MEASURED))


def _counts(sector: Sector, model: nn.Module, rows: Rows) -> Counts:
    batch = to_batch(rows, slice(None), CPU)
    with reproducible(0), torch.no_grad():
        return sector.counts(sector.forward(model.eval(), batch), batch)


def spec_problems(what: str, counts: Counts, specs: Sequence[CountSpec], n: int) -> list[str]:
    """Where `counts` of n rows are not what `specs` announce: the server would refuse them."""
    announced = {s.name: (tuple(s.shape), s.dtype) for s in specs}
    here = {k: (np.shape(v), np.asarray(v).dtype.name) for k, v in counts.items()}
    if here != announced:
        odd = min(k for k in {*here, *announced} if here.get(k) != announced.get(k))
        told, needed = (layout.get(odd, "nothing") for layout in (here, announced))
        return [f"{what} of {n} rows give {told} for {odd}, announced is {needed}"]
    problems = []
    for spec in specs:
        values = np.asarray(counts[spec.name], np.float64)
        if not np.isfinite(values).all() or values.min(initial=0.0) < 0:
            problems.append(f"{what} {spec.name} holds negative or infinite numbers, or NaN")
        elif values.sum() > spec.per_row * n * (1 + TOLERANCE):
            most = f"{n} rows allow {spec.per_row * n:.6g} (per_row={spec.per_row:g})"
            problems.append(f"{what} {spec.name} adds up to {values.sum():.6g}, {most}")
    return problems
