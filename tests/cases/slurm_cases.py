"""Stand-ins for Slurm's commands: jobs run here at once, their state is a file each. What submitit calls, and no more.

`singleton` is kept: a job waits until earlier ones of its name are over. A job that is requeued runs again under its number.
"""

import os
import stat
import sys

SLURM = """#!{python}
import os, re, subprocess, sys, time
from pathlib import Path

HOME = Path({home!r})
command, arguments = Path(sys.argv[0]).name, sys.argv[1:]


def state(job, new=None):
    path = HOME / f"{{job}}.state"
    if new:
        path.with_suffix(".new").write_text(new)
        path.with_suffix(".new").rename(path)
    return path.read_text()


def jobs():
    return sorted(int(path.stem) for path in HOME.glob("*.state"))


if command == "sbatch":
    script = Path(arguments[-1]).read_text()
    job = max(jobs(), default=0) + 1
    (HOME / f"{{job}}.sh").write_text(script)
    (HOME / f"{{job}}.name").write_text(re.search(r"--job-name=(\\S+)", script)[1])
    state(job, "PENDING")
    quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.Popen([HOME / "bin" / "slurmd", str(job)], start_new_session=True, **quiet)
    print(f"Submitted batch job {{job}}")
elif command == "slurmd":
    job = int(arguments[0])
    name = (HOME / f"{{job}}.name").read_text()
    same = [other for other in jobs() if other < job and (HOME / f"{{other}}.name").read_text() == name]
    while "--dependency=singleton" in (HOME / f"{{job}}.sh").read_text() and any(
        state(other) in ("PENDING", "RUNNING", "REQUEUED") for other in same
    ):
        time.sleep(0.05)
    while True:
        state(job, "RUNNING")
        with open(HOME / "started", "a") as started:
            started.write(f"{{job}}\\n")
        status = subprocess.call(["bash", str(HOME / f"{{job}}.sh")], env=os.environ | {{"SLURM_JOB_ID": str(job)}})
        if state(job) != "REQUEUED":
            break
    state(job, "FAILED" if status else "COMPLETED")
elif command == "srun":
    number, log = os.environ["SLURM_JOB_ID"], {{}}
    while arguments[0].startswith("-"):
        option = arguments.pop(0)[2:]
        if option in ("output", "error"):
            log[option] = open(arguments.pop(0).replace("%j", number).replace("%t", "0"), "a")
    sys.exit(abs(subprocess.call(arguments, stdout=log.get("output"), stderr=log.get("error"))))
elif command == "sacct":
    print("JobID|State|NodeList")
    for number in [number for key, number in zip(arguments, arguments[1:]) if key == "-j"]:
        if (HOME / f"{{number}}.state").exists():
            print(f"{{number}}|{{state(number)}}|here")
elif command == "scontrol":
    state(arguments[1], "REQUEUED")
"""


def install_slurm(home, monkeypatch):
    """Puts the stand-ins first on PATH; their state is in `home`."""
    (home / "bin").mkdir(parents=True)
    for name in ("sbatch", "slurmd", "srun", "sacct", "scontrol"):
        path = home / "bin" / name
        path.write_text(SLURM.format(python=sys.executable, home=str(home)))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    import submitit

    watcher = type(submitit.SlurmJob.watcher)(delay_s=2)  # remembers jobs by number, and numbers begin anew here
    monkeypatch.setattr(submitit.SlurmJob, "watcher", watcher)
    monkeypatch.setenv("PATH", str(home / "bin"), prepend=os.pathsep)


def starts(home):
    """How often each job was started."""
    lines = (home / "started").read_text().split()
    return {job: lines.count(job) for job in sorted(set(lines))}
