"""Findings of `check_accelerator` as a page to attach to a bug report."""

from typing import Any

from blocktx.benchmark.accelerator import passed


def page(found: dict[str, Any]) -> str:
    """Return the findings as Markdown."""
    about = found["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    lines = [
        f"# {about['device']}, {about['date']}",
        "",
        "All checks passed." if passed(found) else "**Some checks failed**; see below.",
        "",
        f"{about['devices']} device(s) of platform {about['platform']}; Python {about['python']}; "
        f"{packages}; {about['runtime']}. The checks took {sum(found['seconds'].values()):.0f} s.",
    ]
    for name, write in _SECTIONS.items():
        lines += ["", f"## {name.capitalize()}", ""]
        if name in found["errors"]:
            lines += ["Failed:", "", "```", found["errors"][name].rstrip(), "```"]
        else:
            lines += write(found[name])
    return "\n".join(lines) + "\n"


def _peaks(peaks: dict[str, Any]) -> list[str]:
    def row(name: str, key: str, unit: str) -> str:
        measured, published = peaks[key], peaks[f"published_{key}"]
        share = f"{measured / published:.0%} of {published / 1e12:.3g}" if published else ""
        return f"| {name} | {measured / 1e12:.4g} {unit} | {share} |"

    return [
        "| | measured | of the published peak |",
        "|---|---|---|",
        row(f"matrix products, {peaks['dtype']}", "flops_per_second", "TFLOP/s"),
        row("reads of memory", "bytes_per_second", "TB/s"),
    ]


def _formulations(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Relative distance from the plain formulation in exact float32, of loss and gradient or of "
        "the logits of decoding steps; in brackets that of the plain one in the same dtype.",
        "",
        "| field | value | distance | |",
        "|---|---|---|---|",
    ]
    for result in results:
        if result["error"] is None:
            distance = result["message"].replace("|", r"\|")
        else:
            distance = f"{_numbers(result['error'])} ({_numbers(result['plain_error'])})"
        lines.append(f"| {result['field']} | {result['value']} | {distance} | {_verdict(result)} |")
    return lines


def _training(found: dict[str, Any]) -> list[str]:
    share = found["of_published_peak"]
    peak = f", {share:.1%} of the published peak" if share else ""
    return [
        f"{_verdict(found)}: {len(found['losses'])} steps on one batch of {found['batch_size']}; "
        f"loss {found['losses'][0]:.4f} to {found['losses'][-1]:.4f}; "
        f"{found['seconds'] * 1e3:.1f} ms a step, {found['tokens_per_second']:,.0f} tokens/s, "
        f"{found['flops_per_second'] / 1e12:.4g} TFLOP/s{peak}; first step "
        f"{found['compile_seconds']:.0f} s."
    ]


def _decoding(found: dict[str, Any]) -> list[str]:
    return [
        f"{_verdict(found)}: {found['tokens']} greedy tokens against teacher forcing: "
        f"{found['same_tokens']:.1%} are its likeliest, the others at most "
        f"{found['largest_distance_from_the_likeliest']:.2g} nats below; log-probabilities differ "
        f"by at most {found['largest_difference_of_logprobs']:.2g}."
    ]


def _benchmark(results: list[dict[str, Any]]) -> list[str]:
    first = results[0]
    lines = [
        f"{first['prompt_tokens']} tokens in, {first['new_tokens']} out, prefill included.",
        "",
        "| model | batch | tokens/s | first token, s | MB a row | of the roofline |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r['model']} | {r['batch_size']} | {r['tokens_per_second']:,.0f} | "
            f"{r['seconds_to_first_token']:.3f} | {r['bytes_per_sample'] / 1e6:.1f} | "
            f"{r['roofline_share']:.0%} |"
        )
    return lines


_SECTIONS = {
    "peaks": _peaks,
    "formulations": _formulations,
    "training": _training,
    "decoding": _decoding,
    "benchmark": _benchmark,
}


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.1e}" for value in values)


def _verdict(found: dict[str, Any]) -> str:
    return "ok" if found["ok"] else "**failed**"
