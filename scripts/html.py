"""A co-simulation report as one self-contained page: figures, bars drawn as SVG, the per-layer table."""

from html import escape

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.25em .7em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}.bad{color:#b00020;font-weight:600}.good{color:#176b36;font-weight:600}
svg text{font:12px system-ui,sans-serif}"""
_COLUMNS = (
    ("name", "layer"),
    ("format", "format"),
    ("macs_dense", "MACs dense"),
    ("macs_executed", "MACs executed"),
    ("cycles", "cycles"),
    ("cycles_predicted", "predicted"),
    ("cycles_dense", "dense cycles"),
    ("utilization", "utilization"),
    ("dram_bytes_read", "bytes read"),
    ("dram_bytes_written", "bytes written"),
    ("elements", "elements"),
    ("mismatches", "mismatches"),
    ("sqnr_db", "SQNR dB"),
)


def _cell(value):
    if value is None:
        return "–"
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if isinstance(value, float) else escape(str(value))
    )


def bars(layers):
    """SVG: cycles of each layer, beside the cycles of its dense version."""
    largest = max(max(r["cycles"], r["cycles_dense"] or 0) for r in layers)
    rows, height = [], 34
    for n, r in enumerate(layers):
        y = n * height
        rows.append(f'<text x="150" y="{y + 18}" text-anchor="end">{escape(r["name"][:22])}</text>')
        for k, (value, colour) in enumerate(((r["cycles"], "#1f5fa8"), (r["cycles_dense"], "#c3c9d1"))):
            if value is not None:
                width = 700 * value / largest
                rows.append(
                    f'<rect x="160" y="{y + 3 + 13 * k}" width="{width:.1f}" height="12" fill="{colour}"/>'
                    f'<text x="{166 + width:.1f}" y="{y + 13 + 13 * k}">{value:,}</text>'
                )
    return (
        f'<svg role="img" aria-label="cycles per layer" viewBox="0 0 960 {height * len(layers) + 4}" width="100%">'
        f"{''.join(rows)}</svg>"
    )


def page(tree):
    """HTML text of a report (`sim_tests.bench.cosim.Report.to_dict`)."""
    verdict = '<span class="good">bit-exact</span>' if tree["bit_exact"] else '<span class="bad">NOT bit-exact</span>'
    rows = [*tree["layers"], {"name": "total", "format": ""} | tree["totals"]]
    body = "".join(f"<tr>{''.join(f'<td>{_cell(r.get(key))}</td>' for key, _ in _COLUMNS)}</tr>" for r in rows)
    facts = [
        f"configuration {escape(tree['config_name'])}, digest {escape(tree['config_digest'])}",
        f"{tree['images']} images ({escape(str(tree['input']))}), batch {tree['batch']}",
        f"memory latency {tree['memory']['latency_cycles']} cycles, {tree['memory']['data_bits']}-bit bus",
        f"speed against dense: {_cell(tree['totals']['speedup_vs_dense'])}",
    ]
    facts += (
        [
            f"accuracy on {tree['accuracy']['samples']} samples: "
            + ", ".join(f"{escape(k)} {100 * v:.2f} %" for k, v in tree["accuracy"].items() if k != "samples")
        ]
        if tree["accuracy"]
        else []
    )
    facts.append(", ".join(f"{escape(k)} {escape(str(v))}" for k, v in tree["versions"].items()))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Summand: {escape(tree["network"])}</title>'
        f"<style>{_STYLE}</style><h1>{escape(tree['network'])}: {verdict}</h1>"
        f"<ul>{''.join(f'<li>{f}</li>' for f in facts)}</ul>"
        f"<h2>Cycles (blue: as compressed, grey: the same layer dense)</h2>{bars(tree['layers'])}"
        "<h2>Layers</h2><table>"
        f"<tr>{''.join(f'<th>{escape(title)}</th>' for _, title in _COLUMNS)}</tr>{body}</table></html>\n"
    )
