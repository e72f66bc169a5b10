"""GPU benchmark of the kernels and the model families: one command, no network, no installed package.

`python -m benchmarks.gpu --out DIR` updates DIR/results.json after every row, draws plots, and finally prints a table
that compares each measurement with its target. Stages: machine (versions and the two ceilings), kernels (every op
against float64), attention (compared with torch's libraries), ops (share of the copy bandwidth), models (end to end,
compared with transformers), plots. Figures are medians of at least 20 repeats on random data; every timed kernel is
checked first. If a stage or a row fails, the error is recorded and the run continues: each stage is a process, because
after some errors of a GPU every later call of the process fails. `--tune` writes the block sizes
in `kernels/tables/` instead. `--dry-run` runs everything on a CPU with tiny sizes and plain torch; its figures mean
nothing.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.gpu import tables
from benchmarks.gpu.run import Row, Run
from benchmarks.gpu.timing import Timer

Stage = Callable[[Run], Iterable[Row]]


# Each stage imports its module when it starts, so that an import error fails only that stage.
def machine(run: Run) -> Iterable[Row]:
    from benchmarks.gpu.machine import machine

    return machine(run)


def kernels(run: Run) -> Iterable[Row]:
    from benchmarks.gpu.kernels.ops import kernels

    return kernels(run)


def attention(run: Run) -> Iterable[Row]:
    from benchmarks.gpu.kernels.attention import attention

    return attention(run)


def ops(run: Run) -> Iterable[Row]:
    from benchmarks.gpu.kernels.ops import speeds

    return speeds(run)


def models(run: Run) -> Iterable[Row]:
    from benchmarks.gpu.models.stage import models

    return models(run)


def tune(run: Run) -> Iterable[Row]:
    from benchmarks.gpu.kernels.tune import tune

    return tune(run)


def plots(run: Run) -> Iterator[Row]:
    from benchmarks.gpu.plots import PLOTS
    from benchmarks.plots import draw

    for file in draw(run.out / "results.json", PLOTS):
        yield {"what": file.name}


STAGES: dict[str, Stage] = {stage.__name__: stage for stage in (machine, tune, kernels, attention, ops, models, plots)}


def perform(run: Run, names: list[str], stages: Mapping[str, Stage] = STAGES) -> None:
    """Run the stages in order; write each row to disk before computing the next one."""
    for name in names:
        begin = time.monotonic()
        stage: dict[str, Any] = {"rows": []}
        run.results["stages"][name] = stage
        write(run)
        try:
            for row in stages[name](run):
                stage["rows"].append(row)
                print(f"{time.monotonic() - run.begin:5.0f} s  {name:9}  {tables.line(row)}", flush=True)
                stage["seconds"] = time.monotonic() - begin
                write(run)
        except Exception as error:  # noqa: BLE001 - a failing stage must not stop the others
            stage["error"] = "".join(traceback.format_exception(error))
            print(f"{time.monotonic() - run.begin:5.0f} s  {name:9}  FAILED: {error!r}", flush=True)
        stage["seconds"] = time.monotonic() - begin
        write(run)


def perform_in_processes(
    options: argparse.Namespace, names: list[str], program: Sequence[str] = (sys.executable, "-m", "benchmarks.gpu")
) -> dict[str, Any]:
    """Run each stage in a process, which adds to the results; note the stages whose process ended early."""
    begin, file = time.monotonic(), options.out / "results.json"
    file.unlink(missing_ok=True)
    for name in names:
        left = options.minutes - (time.monotonic() - begin) / 60
        command = [*program, *sys.argv[1:], "--stage", name, "--minutes", str(left)]
        code = subprocess.run(command, check=False).returncode
        results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"stages": {}}
        if code:
            results["stages"].setdefault(name, {"rows": []})["error"] = f"the process of the stage ended with {code}"
            print(f"{time.monotonic() - begin:5.0f} s  {name:9}  FAILED: its process ended with {code}", flush=True)
        results |= {"seconds": time.monotonic() - begin, "command": shlex.join(["python", *sys.orig_argv[1:]])}
        report.save(file, results)
    return results


def write(run: Run) -> None:
    """Write what is measured so far."""
    report.save(run.out / "results.json", run.results)


def selected_stages(options: argparse.Namespace) -> list[str]:
    """Return the stages to run, in order.

    The machine stage always runs unless it is skipped by name, because shares are computed from its ceilings.
    """
    names = set(options.only or ([] if options.tune else STAGES.keys() - {"tune"})) | {"machine"}
    names |= {"tune"} if options.tune else set()
    return [name for name in STAGES if name in names and name not in options.skip]


def _stage_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in STAGES]:
        raise argparse.ArgumentTypeError(f"unknown stage: {', '.join(unknown)}; available stages: {', '.join(STAGES)}")
    return names


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for results.json and the plots")
    add("--only", type=_stage_names, metavar="A,B", help=f"run only these stages: {', '.join(STAGES)}")
    add("--skip", type=_stage_names, default=[], metavar="C", help="skip these stages")
    add("--tune", action="store_true", help="find block sizes and write them to kernels/tables/ (and to DIR)")
    add("--dry-run", action="store_true", help="use tiny sizes on a CPU to check that everything runs")
    add("--minutes", type=float, default=8, help="do not start models that would finish later than this (%(default)s)")
    add("--commit", help="the commit that is measured, where git does not know it")
    add("--stage", choices=STAGES, help=argparse.SUPPRESS)  # runs one stage in this process, and adds to the results
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: no GPU found; use --dry-run to run tiny sizes on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage:
        stage(options)
        return
    names = selected_stages(options)
    results = perform_in_processes(options, names)
    print("\n".join(["", *tables.failures(results), *tables.summary(results)]))
    if {"attention", "ops", "models"} & set(names):
        print(f"\n{tables.table(results)}")
    if options.dry_run:
        print("dry run: these figures mean nothing")
    print(f"written: {options.out / 'results.json'}")


def stage(options: argparse.Namespace) -> None:
    """Run one stage in this process."""
    device = torch.device("cpu" if options.dry_run else "cuda:0")
    if options.dry_run:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    from benchmarks.gpu import machine as gpu_machine

    timer = Timer(device, repeats=3 if options.dry_run else 20)
    run = Run(device, options.out, options.dry_run, timer, time.monotonic() + 60 * options.minutes)
    file = options.out / "results.json"
    if file.exists():
        run.results |= json.loads(file.read_text())
    else:
        run.results |= report.header(gpu_machine.versions())
        if options.commit:
            run.results["commit"] = options.commit
        run.results |= {
            "gpu": gpu_machine.gpu(device),
            "dry_run": options.dry_run,
            "ceilings": {},
            "stages": {},
        }
        print(run.results["gpu"], run.results["versions"], sep="\n", flush=True)
    perform(run, [options.stage])


if __name__ == "__main__":
    main()
