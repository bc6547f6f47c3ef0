"""`executor.slurm`: the options of submitit that a study passes on, and those it adds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from muonscale.errors import StudyError, nearest
from muonscale.lab.studies.config import ExecutorSection

if TYPE_CHECKING:
    from submitit import AutoExecutor

INSTALL = 'executor.kind=slurm needs submitit; install it with: pip install "muonscale[slurm]"'

MINUTES = 60
"""Default time limit of a job. A run that needs longer continues in another job."""

TIMEOUTS = 1000
"""How often a run may reach its time limit."""

AT_START = ("slurm_max_num_timeout", "slurm_max_pickle_size_gb", "slurm_python")
"""Options of the constructor of submitit's executor."""

ONE_PROCESS = (
    "nodes",
    "tasks_per_node",
    "slurm_nodes",
    "slurm_tasks_per_node",
    "slurm_ntasks_per_node",
)
NOT_THE_USERS = {
    **dict.fromkeys(ONE_PROCESS, "a run of a study is one process"),
    **dict.fromkeys(
        ("name", "slurm_name", "slurm_job_name"), "the study finds its jobs by their name"
    ),
    "slurm_array_parallelism": "use executor.workers",
    "slurm_use_srun": "a run gets the signal to save itself through srun",
}


def make_submitter(
    section: ExecutorSection, folder: Path, name: str, workers: int | None
) -> AutoExecutor:
    """Return submitit's executor for a job array of a study.

    Raises:
        StudyError: for an unknown option, one that the study sets itself, or a wrong value.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise StudyError(f"{INSTALL} (missing: {error.name})") from error
    check_options(section.slurm)
    given: dict[str, Any] = {
        "cpus_per_task": section.threads,
        **({} if "slurm_time" in section.slurm else {"timeout_min": MINUTES}),
        **section.slurm,
    }
    at_start: dict[str, Any] = {"slurm_max_num_timeout": TIMEOUTS}
    at_start |= {key: given.pop(key) for key in AT_START if key in given}
    # Since Slurm 22.05 srun no longer takes the job's number of CPUs.
    given.setdefault("slurm_srun_args", [f"--cpus-per-task={given['cpus_per_task']}"])
    more = {**given.pop("slurm_additional_parameters", {}), "hold": True, "requeue": True}
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm", **at_start)
        executor.update_parameters(
            **given, name=name, slurm_array_parallelism=workers, slurm_additional_parameters=more
        )
    except (AssertionError, NameError, TypeError, ValueError) as error:
        raise StudyError(f"executor.slurm: {error}") from error
    return executor


def check_options(given: dict[str, Any]) -> None:
    """Check that submitit has all options, and that the study sets none of them itself.

    Raises:
        StudyError: naming the option and what is accepted.
    """
    from submitit import AutoExecutor, SlurmExecutor

    generic = AutoExecutor._valid_parameters()
    own = {f"slurm_{key}" for key in SlurmExecutor._valid_parameters() | generic}
    known = (generic | own | set(AT_START)) - NOT_THE_USERS.keys()
    for key, value in given.items():
        if key in NOT_THE_USERS:
            raise StudyError(f"executor.slurm: {key}={value!r}: {NOT_THE_USERS[key]}; leave it out")
        if key not in known:
            hint = f"; did you mean slurm_{key}?" if f"slurm_{key}" in known else ""
            raise StudyError(
                "executor.slurm: submitit has no option "
                f"{key!r}{hint or '; ' + nearest(key, known)}"
            )
