"""Everything that is random, with seeds that nobody has tried: what ``make soak SEEDS=N`` runs.

``python -m sim_tests.soak.run --seeds N [--first S] [--jobs J] [--parts PART ...]``. Parts:

* ``tests``: the whole test suite per seed, hypothesis without its fixed examples and with more of them;
* ``networks``: per seed a random configuration, random networks on its RTL (`sim_tests.soak.networks`);
* ``mutants``: once, campaigns of faults chosen by the first seed (`sim_tests.soak.mutate`), a rate below 90 % fails.

The first seed is taken from the clock unless given, so every run tries new ones. Each failure prints one command that
repeats it; the end repeats them all. Logs and build/soak/run.json stay. Exit status: 0 if nothing failed.
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
import time

from sim_tests.lib.simulate import ROOT
from sim_tests.soak import PYTHON
from sim_tests.soak.mutate import OUT

PARTS = ("tests", "networks", "mutants")
#: Percent of real mutants that each campaign must kill.
LEAST = 90


def call(words, log, *, soak=False):
    """Run a command from the root of the project with its output in a log; returns (status, output)."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=os.environ | ({"SUMMAND_SOAK": "1"} if soak else {}))
    log.write_text(done.stdout)
    return done.returncode, done.stdout


def shown(words, *, soak=False):
    """The command as one line for a shell."""
    return ("SUMMAND_SOAK=1 " if soak else "") + shlex.join([PYTHON, *words])


def tests(seed, jobs):
    """(what was found, commands that repeat the failures)."""
    words = ["-m", "pytest", "-q", "-rfE", "-n", str(jobs), "--seed", str(seed)]
    status, text = call(words, OUT / f"tests_{seed}.log", soak=True)
    lines = text.splitlines()
    bad = [line.split(" ", 1)[1].split(" - ")[0] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    commands = [shown(["-m", "pytest", "--seed", str(seed), name], soak=True) for name in bad]
    if status and not commands:
        commands = [shown(words, soak=True)]
    return lines[-1] if lines else "no output", commands


def networks(seed):
    """(what was found, commands that repeat the failures)."""
    words = ["-m", "sim_tests.soak.networks", "--seed", str(seed)]
    status, text = call(words, OUT / f"networks_{seed}.log")
    commands = [line.split("repeat with: ")[1] for line in text.splitlines() if "repeat with: " in line]
    if status and not commands:
        commands = [shown(words)]
    return (text.strip().splitlines() or ["no output"])[-1], commands


def mutants(seed, count):
    """(what was found, commands that repeat the failures)."""
    words = ["-m", "sim_tests.soak.mutate", "--seed", str(seed), "--mutants", str(count), "--least", str(LEAST)]
    status, text = call(words, OUT / f"mutants_{seed}.log")
    return text.strip(), [shown(words)] if status else []


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m sim_tests.soak.run", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--first", type=int, default=int(time.time()) % 1_000_000_000, help="the first one")
    parser.add_argument("--jobs", type=int, default=2, help="test processes")
    parser.add_argument("--mutants", type=int, default=300, help="per component")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    OUT.mkdir(parents=True, exist_ok=True)
    plan = [(part, seed) for seed in range(args.first, args.first + args.seeds) for part in ("tests", "networks")
            if part in args.parts]
    if "mutants" in args.parts:
        plan.append(("mutants", args.first))
    repeat, rows = [], []
    for part, seed in plan:
        began = time.monotonic()
        found, commands = {"tests": lambda s: tests(s, args.jobs), "networks": networks,
                           "mutants": lambda s: mutants(s, args.mutants)}[part](seed)
        rows.append({"part": part, "seed": seed, "found": found, "failures": commands,
                     "seconds": round(time.monotonic() - began, 1)})
        print(f"{part}, seed {seed}: {found}", flush=True)
        for command in commands:
            print(f"  repeat with: {command}", flush=True)
        repeat += commands
        (OUT / "run.json").write_text(json.dumps({"first": args.first, "seeds": args.seeds, "rows": rows}, indent=1))
    print(f"{len(plan)} parts, {len(repeat)} failures" + "".join(f"\n  {command}" for command in repeat))
    return int(bool(repeat))


if __name__ == "__main__":
    sys.exit(main())
