"""The figures of a run as lines of text, for the terminal and for the page."""

from collections.abc import Mapping

REPLAY = {
    "recorded": "recorded actions, replayed",
    "idm_real": "labels of real video, replayed",
    "idm_dream": "labels of dreams, replayed",
}
POLICY = {"real": "policy, demonstrations only", "real_dreams": "policy, demonstrations + dreams"}


def successes(results: Mapping) -> list[tuple[str, dict]]:
    """What was measured as a success rate: (name, {successes, n, rate, low, high})."""
    rows = []
    for group, names in (("replay", REPLAY), ("policy", POLICY)):
        measured = results.get(group, {})
        known = [key for key in names if key in measured]
        other = [key for key, value in measured.items() if key not in names and isinstance(value, Mapping)]
        for key in known + other:
            if "rate" in measured[key]:
                rows.append((names.get(key, f"{group}, {key.replace('_', ' ')}"), measured[key]))
    return rows


def differences(results: Mapping) -> list[tuple[str, str]]:
    """(name, words) of each policy that was evaluated against another on the same first states."""
    return [(f"{POLICY.get(key, key)}, paired",
             f"{100 * d['difference']:+.1f} points [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}], {d['won']} won and "
             f"{d['lost']} lost of {d['n']}, p {d['p']:.2g}{each(d)}")
            for key, d in results.get("difference", {}).items()]  # fmt: skip


def each(measured: Mapping) -> str:
    """What each of several trainings gave, in words; "" for one."""
    rates = [f"{100 * rate:+.1f}" for rate in measured.get("trainings", ())]
    if not rates:
        return ""
    low, high = measured["trainings_low"], measured["trainings_high"]
    return f"; of {len(rates)} trainings {', '.join(rates)}, their mean [{100 * low:+.1f}, {100 * high:+.1f}]"


def errors(results: Mapping) -> list[tuple[str, float]]:
    """What was measured as a number: R2 of the labels, open-loop errors of policies."""
    r2 = results.get("idm", {}).get("r2", {})
    rows = [(f"labels, R2 of {part.replace('_', ' ')}", value) for part, value in r2.items() if value is not None]
    for key, value in results.get("policy", {}).get("open_loop", {}).items():
        for name, number in value.items() if isinstance(value, Mapping) else [("error", value)]:
            if isinstance(number, int | float):
                told = name.removeprefix("control_").replace("_", " ")
                mean = " of the mean action" if name.startswith("control_") else ""
                rows.append((f"{POLICY.get(key, key)}, open-loop {told}{mean}", number))
    return rows


def table(results: Mapping) -> str:
    """Names, rates and intervals in columns."""
    lines = []
    if rows := successes(results):
        width = max(len(name) for name, _ in rows)
        lines.append(f"{'success':<{width}}   rate   95% interval    n")
        for name, s in rows:
            lines.append(f"{name:<{width}}  {s['rate']:5.1%}  {s['low']:6.1%} to {s['high']:6.1%}  {s['n']:>4}")
    if rows := differences(results):
        lines += ["", *(f"{name}: {told}" for name, told in rows)]
    if rows := errors(results):
        width = max(len(name) for name, _ in rows)
        lines += ["", *(f"{name:<{width}}  {value:8.3f}" for name, value in rows)]
    if stages := results.get("stages", {}):
        width = max(len(name) for name in stages)
        lines += [
            "",
            *(f"{name:<{width}}  {s['seconds']:8.1f} s  {s['peak_mb']:7.0f} MB" for name, s in stages.items()),
        ]
        lines.append(f"{'all':<{width}}  {sum(s['seconds'] for s in stages.values()):8.1f} s")
    return "\n".join(lines).strip("\n")
