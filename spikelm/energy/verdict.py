"""What the figures say, in sentences, against the break-even points that others have published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

YAN_RATE, YAN_STEPS = 0.057, 5
"""Spike rate per time step below which spikes win over the quantised network, and the steps it is for."""
DAMPFHOFFER = (0.15, 1.38)
"""Spikes per synapse and inference at which spikes begin to lose, least and most favourable case."""
DAVIDSON = 1.72
"""Spikes per neuron and inference at which a rate-coded network loses on digital hardware."""


def sentences(model: Mapping[str, Any], table: str) -> list[str]:
    """The verdict on a model.

    Args:
        model: its entry of the JSON, all but ``verdict``.
        table: name of the price table that is shown.
    """
    operations = model["operations"]
    found = [_projections(operations)]
    sent = {name: one for name, one in operations["codings"].items() if "not_applicable" not in one}
    if sent:
        found += _thresholds(sent)
        found += _energy(model["energy"], table)
    found += _bytes(model)
    found += _measured(model["measured"])
    return found


def _projections(operations: Mapping[str, Any]) -> str:
    ratio, share = operations["projections_over_dense"], operations["total"]["spiking_share"]
    if share == 0:
        skipped = 1.0 - operations["effective_over_dense"]
        zeros = (
            f" {skipped:.0%} of their inputs' multiply-accumulates meet a zero that an activation left; the "
            "continuous twin has those too, and no kernel here skips them."
            if skipped > 0.005
            else ""
        )
        return (
            f"Projections do {ratio:.2f}x the dense multiply-accumulates: the input of none is spikes (what "
            "a norm, a mixture or a gate puts out is dense), so nothing becomes an accumulate."
            f"{zeros}"
        )
    return (
        f"Projections do {ratio:.2f}x the dense multiply-accumulates if zeros of spikes are skipped; "
        f"{share:.1%} of them have spikes as their input."
    )


def _thresholds(sent: Mapping[str, Mapping[str, Any]]) -> list[str]:
    unary = "ternary" if "ternary" in sent else next(iter(sent))
    found = []
    for name in dict.fromkeys((unary, min(sent, key=lambda key: sent[key]["events_per_input"]))):
        one = sent[name]
        spikes, steps = one["events_per_input"], one["micro_steps"]
        limit = YAN_RATE * YAN_STEPS
        weighted = "; weighted steps, while the thresholds are for steps of weight one" * (
            one["plane_additions"] > 0
        )
        found.append(
            f"Coding {name}: {spikes:.3f} spikes per input and token over {steps} micro-steps "
            f"({1.0 - one['sparsity']:.1%} per step{weighted}). Yan et al. want less than {YAN_RATE:.1%} at "
            f"T = {YAN_STEPS}, {limit:.3f} per input: {_word(spikes < limit)}. Dampfhoffer et al. give "
            f"{DAMPFHOFFER[0]} to {DAMPFHOFFER[1]} per synapse: {_between(spikes)}. Davidson and Furber "
            f"give {DAVIDSON}: {_word(spikes < DAVIDSON)}."
        )
    return found


def _word(below: bool) -> str:
    return "below, spikes may win" if below else "above, spikes lose"


def _between(spikes: float) -> str:
    low, high = DAMPFHOFFER
    if spikes < low:
        return "below, spikes may win"
    return "above, spikes lose" if spikes > high else "between, it depends on the hardware"


def _cheapest(compute: Mapping[str, Any]) -> tuple[str, float]:
    """The coding that takes least arithmetic, and its picojoules."""
    named = {name: value for name, value in compute["spikes"].items() if value is not None}
    best = min(named, key=lambda name: named[name])
    return best, named[best]


def _energy(tables: Mapping[str, Any], table: str) -> list[str]:
    energy = tables[table]
    compute = energy["compute"]
    best, picojoules = _cheapest(compute)
    rival = compute["quantised_effective"]
    ratios = [_cheapest(one["compute"])[1] / one["compute"]["quantised_effective"] for one in tables.values()]
    found = [
        f"Estimated arithmetic ({table}): the cheapest coding, {best}, takes {picojoules / 1e6:.4g} uJ per "
        f"token, {picojoules / compute['dense']:.2f}x dense and {picojoules / rival:.2f}x a quantised "
        f"network with the same zeros: spikes {'save' if picojoules < rival else 'cost'} "
        f"{abs(1 - picojoules / rival):.0%} ({min(ratios):.2f}x to {max(ratios):.2f}x over all price tables)."
    ]
    small = compute["quantised_int8"]
    if small < 0.99 * rival:
        found.append(
            "Its weights are float; a network that quantises activations would have int8 weights and take "
            f"{small / 1e6:.4g} uJ, so that spikes take {picojoules / small:.2f}x of that (spikelm convert "
            "spike --weights int8 makes such weights)."
        )
    for batch, total in energy["total"].items():
        spikes, other = total["spikes"][best]["low"], total["quantised_effective"]["low"]
        share = 1 - energy["memory"][batch]["kernels"]["low"] / spikes
        found.append(
            f"With memory, {batch.replace('_', ' ')}: {spikes / total['dense']['low']:.2f}x dense and "
            f"{spikes / other:.2f}x the quantised network; arithmetic is {share:.1%} of it."
        )
    return found


def _bytes(model: Mapping[str, Any]) -> list[str]:
    one = model["bytes"]["batch_1"]
    skipped = one["weights"]["skipped"]
    layouts = [entry["layout"] for entry in model["operations"]["projections"].values()]
    if one["residency"] == "all":
        return ["The whole model stays on the chip: no weight comes from DRAM."]
    if skipped > 0:
        return [
            f"At batch 1 the kernels leave out {skipped:.0%} of the weight bytes: "
            f"{layouts.count('in_out')} of {len(layouts)} matrices are laid out event-driven."
        ]
    why = (
        "float weights have no event-driven form"
        if not any(layouts)
        else "too few inputs are silent for the event-driven form"
    )
    return [f"No weight byte is skipped at batch 1 ({why}): zeros save no DRAM traffic here."]


def _measured(measured: Mapping[str, Any]) -> list[str]:
    if measured["seconds_per_token"] is None:
        return [f"Nothing was timed: {measured['why']}."]
    event, dense = measured["event_driven"], measured["dense"]
    found = f"Measured: {measured['tokens_per_second']:.1f} tokens/s"
    if event is not None and dense is not None:
        found += (
            f" event-driven, {dense['seconds_per_token'] / event['seconds_per_token']:.2f}x the dense layout"
        )
    joules = measured["joules_per_token"]
    ending = f"{joules:.4g} J per token by {measured['counter']}" if joules else measured["counter"]
    return [f"{found}; {ending}."]
