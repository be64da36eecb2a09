"""`--coordinator HOST:PORT --processes N --process I`: a job's place by hand, where no launcher tells it."""

from collections.abc import Sequence

from rethinker_jax.errors import UserError

# Options → the variables of jax that say the same, which `devices.find_job` reads.
VARIABLES = {
    "--coordinator": "JAX_COORDINATOR_ADDRESS",
    "--processes": "JAX_NUM_PROCESSES",
    "--process": "JAX_PROCESS_ID",
}


def take_job_options(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(the other words, variables of the job): they are the same in all processes, which these options are not.

    Raises UserError where not all three are given once, or are no place in a job.
    """
    rest: list[str] = []
    values: dict[str, str] = {}
    left = iter(words)
    for word in left:
        option, equals, value = word.partition("=")
        if option not in VARIABLES:
            rest.append(word)
            continue
        if option in values:
            raise UserError(f"{option} is given twice")
        values[option] = value if equals else next(left, "")
    if not values:
        return rest, {}
    missing = [option for option in VARIABLES if not values.get(option)]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: wanted all of --coordinator HOST:PORT --processes N --process I, or none of them"
        )
    processes, process = values["--processes"], values["--process"]
    if not (processes.isdecimal() and process.isdecimal() and int(process) < int(processes)):
        raise UserError(
            f"--processes {processes} --process {process}: wanted the number of processes, and which of them this is, "
            "from 0"
        )
    return rest, {VARIABLES[option]: value for option, value in values.items()}
