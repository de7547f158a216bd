"""The log of a run: ``log.json`` (all rows), ``log.csv`` (a line for each epoch) and ``layers.csv`` (one for each layer
and figure of an epoch), all written again after each epoch, and two plots made from them."""
from contextlib import suppress
import csv
import io
import json
import os

from spec.errors import InputError

COLUMNS = ("stage", "epoch", "rate", "loss", "train_accuracy", "validation_accuracy", "seconds", "images_per_second")


def write(folder, rows):
    """Write the three files. Rows: dicts with `COLUMNS` and, for techniques, ``figure`` or ``layer/figure``."""
    replace_text(folder / "log.json", json.dumps(rows, indent=1) + "\n")
    shared = sorted({k for row in rows for k in row if "/" not in k and k not in (*COLUMNS, "finished")})
    epochs = [row for row in rows if "finished" not in row]
    replace_text(folder / "log.csv", _table((*COLUMNS, *shared), [[row.get(k, "") for k in (*COLUMNS, *shared)]
                                                              for row in epochs]))
    layers = [[row["stage"], row["epoch"], *k.rsplit("/", 1), v] for row in epochs for k, v in row.items() if "/" in k]
    replace_text(folder / "layers.csv", _table(("stage", "epoch", "layer", "figure", "value"), layers))


def _table(head, rows):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()


def replace(path, write):
    """A file of a run, whole or not at all: ``write(part)`` writes it under another name first.

    Raises: InputError if that is not possible (a full disk, a folder that must not be written).
    """
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:                      # PyTorch tells a full disk by a RuntimeError
        with suppress(OSError):
            part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:80]
        raise InputError(f"must be writable ({reason})", source=path) from None


def replace_text(path, text):
    """`replace` by a text."""
    replace(path, lambda part: part.write_text(text, encoding="utf-8"))


def plots(folder, rows):
    """``accuracy.svg`` (training and validation over the epochs of all stages) and, where a technique logs it,
    ``residual.svg`` (``||W - Z|| / ||W||`` of each layer)."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure                         # no display, no global state

    epochs = [row for row in rows if "finished" not in row]
    if not epochs:
        return
    x = range(1, len(epochs) + 1)
    edges = [n + 0.5 for n in range(1, len(epochs)) if epochs[n]["stage"] != epochs[n - 1]["stage"]]
    drawings = {"accuracy.svg": ("accuracy / %", {name: [100 * row[f"{name}_accuracy"] for row in epochs]
                                                  for name in ("train", "validation")}, "linear")}
    layers = sorted({k for row in epochs for k in row if k.endswith("/residual")})
    if layers:
        lines = {k.rsplit("/", 1)[0]: [row.get(k, float("nan")) for row in epochs] for k in layers}
        drawings["residual.svg"] = ("||W - Z|| / ||W||", lines, "log")
    for name, (label, lines, scale) in drawings.items():
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot(xlabel="epoch", ylabel=label, yscale=scale)
        for line, values in lines.items():
            axes.plot(x, values, label=line, linewidth=1)
        for edge in edges:
            axes.axvline(edge, color="grey", linewidth=0.5)
        axes.legend(fontsize=6, ncols=2)
        with rc_context({"svg.hashsalt": "summand"}):             # the same run draws the same file
            replace(folder / name, lambda part, figure=figure: figure.savefig(part, format="svg",
                                                                              metadata={"Date": None}))
