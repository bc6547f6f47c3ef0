"""Slurm's commands for a cluster that does nothing by itself: a test says what its jobs do."""

from __future__ import annotations

import sys
from pathlib import Path

COMMANDS = {
    "srun": "",
    # The job ids of an array are one after the other, as are the lines of its file.
    "sbatch": """
n=$(($(ls submitted | wc -l) + 1))
cp "$1" submitted/$n
name=$(sed -n 's/^#SBATCH --job-name=//p' "$1")
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
grep -q '^#SBATCH --hold' "$1" && state='PENDING|JobHeldUser' || state='PENDING|Priority'
if [ -z "$last" ]; then echo "$name|$n|N/A|$state" >jobs/$n
else for i in $(seq 0 $last); do echo "$name|$n|$i|$state" >jobs/${n}_$i; done; fi
echo "Submitted batch job $n"
""",
    "squeue": """
echo squeue >>calls
[ -e down ] && { echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1; }
for word in "$@"; do case $word in
  --name=*) cat jobs/* 2>/dev/null | sed -n "s/^${word#--name=}|//p" ;;
  --jobs=*) cut -d'|' -f4 jobs/${word#--jobs=} ;;
esac; done
""",
    "scontrol": """
echo scontrol $@ >>calls
[ -e stuck ] && { echo 'release: error' >&2; exit 1; }
for job in jobs/$2 jobs/$2_*; do
  [ -e $job ] && grep -q JobHeldUser $job && { sed -i 's/PENDING|JobHeldUser/RUNNING|None/' $job
  echo "${job#jobs/}" >>begun; }
done
exit 0
""",
    "scancel": """
echo scancel $@ >>calls
for id in "$@"; do sed -i 's/[^|]*|[^|]*$/CANCELLED|None/' jobs/$id; done
""",
    "sacct": """
[ -e accounting ] && cat accounting && exit 0
echo 'Slurm accounting storage is disabled' >&2
exit 1
""",
}


class FakeSlurm:
    """The cluster; its state is files.

    Args:
        folder: empty.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.bin = folder / "bin"
        for name in ("bin", "submitted", "jobs"):
            (folder / name).mkdir()
        for name, text in COMMANDS.items():
            path = self.bin / name
            path.write_text(f"#!/bin/bash\ncd {folder}\n{text}")
            path.chmod(0o755)
        (self.bin / "python").symlink_to(sys.executable)

    @property
    def submitted(self) -> list[str]:
        """Texts of the batch files, in order."""
        paths = (self._folder / "submitted").iterdir()
        return [path.read_text() for path in sorted(paths, key=lambda path: int(path.name))]

    @property
    def begun(self) -> list[str]:
        """Jobs that were let begin, in order."""
        return self._lines("begun")

    @property
    def calls(self) -> list[str]:
        """Commands that were given, but for sbatch."""
        return self._lines("calls")

    def set_state(self, job: str, state: str, reason: str = "None") -> None:
        """Say what a job is doing."""
        path = self._folder / "jobs" / job
        path.write_text("|".join([*path.read_text().split("|")[:3], state, reason]) + "\n")

    def give(self, name: str, job: str) -> None:
        """Have a running job of a name, from elsewhere."""
        (self._folder / "jobs" / job).write_text(f"{name}|{job}|N/A|RUNNING|None\n")

    def forget(self, job: str) -> None:
        """Have a job leave the queue."""
        (self._folder / "jobs" / job).unlink()

    def state(self, job: str) -> str:
        """Return what a job is doing."""
        return (self._folder / "jobs" / job).read_text().split("|")[3]

    def have(self, what: str, text: str = "") -> None:
        """Have an ailment (`down`, `stuck`) or `accounting`, which says `text`."""
        (self._folder / what).write_text(text)

    def cure(self, what: str) -> None:
        """End an ailment."""
        (self._folder / what).unlink()

    def _lines(self, name: str) -> list[str]:
        path = self._folder / name
        return path.read_text().splitlines() if path.exists() else []
