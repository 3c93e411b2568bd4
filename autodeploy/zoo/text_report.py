"""The report on one model: what it became, and what stands in the way of more."""

from __future__ import annotations

from autodeploy.ladder import RUNGS

from .measure import Record


def text(record: Record, *, tiny: bool) -> str:
    """The record as a person reads it, with what to do about anything below the top rung."""
    what = "a tiny random model of its config" if tiny else "the checkpoint"
    lines = [f"{record.name}: {_headline(record)}", f"measured: {what}, {record.seconds:.1f} s"]
    lines += _row("attention", record.attention)
    lines += _row("caches", record.caches)
    lines += _row("our ops", [f"{n} {name}" for name, n in record.recognised.items()])
    lines += _row("its own code", [f"{n} {name}" for name, n in record.own_code.items()])
    lines += _row("unrecognised", [f"{n} {name}" for name, n in record.unrecognised.items()])
    if record.logit_error is not None:
        lines.append(f"logits:       {record.logit_error:.1e} of their range from the plain model")
    if record.served:
        served = record.served
        lines.append(
            f"served:       {served['tokens']} greedy tokens, {served['wrong_tokens']} wrong, log "
            f"probabilities within {served['logprob_error']:.1e}; {served['preemptions']} "
            f"preemptions, {served['prefix_hits']} tokens from shared prefixes"
        )
    if record.cause:
        lines.append(f"cause:        {record.cause}")
    return "\n".join([*lines, *_advice(record)])


def _headline(record: Record) -> str:
    if not record.made:
        return "no model"
    if record.failed:
        return "failed"
    if record.rung == 0:
        return "refused"
    exact = "exact" if record.exact else "NOT EXACT"
    return f"rung {record.rung} of 3 ({RUNGS[record.rung]}), {exact}"


def _row(name: str, values: list[str]) -> list[str]:
    return [f"{name + ':':13} {', '.join(values)}"] if values else []


def _advice(record: Record) -> list[str]:
    if record.failed:
        return ["what to do:   report it with this text; it is a bug of autodeploy or of the model"]
    if record.own_code and record.rung == 1:
        kinds = ", ".join(record.own_code)
        return [
            f"what to do:   it deploys as it is; to make it fast, register an op for {kinds} "
            "(docs/ops.md)"
        ]
    if record.rung in (2, 3):
        return [
            "what to do:   it deploys, slowly; the cause names the line of the model that stands "
            "in the way"
        ]
    return []
