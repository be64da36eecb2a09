"""The command line: `python -m rethinker_jax.main [COMMAND] [CONFIG.yaml] [--mesh [SPEC]] [section.key=value ...]`.

Exit codes: 0 done, 2 bad input (one message, no traceback), 75 stopped with a checkpoint saved, 130 interrupted,
1 a defect.
"""

import argparse
import errno
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rethinker_jax import __version__, peers
from rethinker_jax.commands import COMMANDS, Request
from rethinker_jax.config_keys import ALL_KEYS, listing, nearest
from rethinker_jax.errors import Stopped, UserError
from rethinker_jax.job_options import take_job_options
from rethinker_jax.mesh_spec import is_mesh_spec, parse_mesh
from rethinker_jax.options import is_profile_steps

PROGRAM = "python -m rethinker_jax.main"
MEMORY_LEVERS = (
    "Take more devices (--mesh), or lower sampling.num_slots, training.micro_batch_tokens or the token budgets, or set "
    "model.remat=full, model.lora.rank or model.freeze (docs/recipes.md, Memory)."
)
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[^\s=]+)?=.*", re.DOTALL)
# How jax's runtime begins its errors, which come as several types, ValueError among them.
_RUNTIME = re.compile(
    r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|DATA_LOSS):"
)
_WORDS_HELP = """\
CONFIG.yaml        a YAML file, or package:NAME for one that comes with the package
section.key=value  overrides one key; may stand anywhere and be repeated, the last one holds
"""
_MESH_HELP = """\
--mesh             every visible device on the fsdp axis
--mesh auto        the quickest sizes that are estimated to fit the devices; the run says which, and why
--mesh SPEC        sizes of the axes data, fsdp, context and tensor: data=2,fsdp=4,tensor=2; -1 takes the devices left,
                   an axis not named has size 1. context cuts the tokens of an update, for prompts too long for a
                   device. Without --mesh, the config's. JAX_NUM_CPU_DEVICES=8 simulates eight devices
--coordinator HOST:PORT --processes N --process I
                   the place of this process in a job of N, I from 0, where no launcher tells it
"""


class _Parser(argparse.ArgumentParser):
    """argparse that reports errors as every other bad input is reported."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _program_help() -> str:
    rows = "\n".join(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items())
    return f"""\
usage: {PROGRAM} [COMMAND] [CONFIG.yaml] [--mesh [SPEC]] [section.key=value ...]

Trains Qwen2.5-VL to reason and to check itself by reinforcement learning. Without arguments: the embedded example.

commands (COMMAND --help tells more):
{rows}

{_WORDS_HELP}
{_MESH_HELP}
exit codes: 0 done, 2 bad input, 75 stopped with a checkpoint saved (run again to go on), 130 interrupted, 1 a defect

examples:
  {PROGRAM} --mesh
  {PROGRAM} train my.yaml --mesh data=2,fsdp=4 run.seed=1 run.dir=runs/second
  {PROGRAM} sample --model runs/example/export --data rows.parquet --n 8 sampling.temperature=0.7
  {PROGRAM} verify --input answers.jsonl --output verdicts.jsonl"""


def _command_parser(name: str, with_help: bool) -> argparse.ArgumentParser:
    """The parser of a command's options. The listing of config keys is made only where it will be shown."""
    command = COMMANDS[name]
    epilog = ""
    if with_help and (command.sections or command.takes_mesh):
        epilog = _WORDS_HELP + (_MESH_HELP if command.takes_mesh else "")
        if command.sections:
            epilog += f"\nconfig keys with their defaults:\n{listing(command.sections)}"
    parser = _Parser(
        prog=f"{PROGRAM} {name}",
        usage=f"{PROGRAM} {name} {command.usage}",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.\n\n{command.details}",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if command.takes_mesh:
        # Written as --mesh=SPEC by `_join_values`; it is explained in the epilog.
        parser.add_argument("--mesh", help=argparse.SUPPRESS)
    command.add_options(parser)
    return parser


# Options that may stand alone, and which of the words behind them are meant for them.
_MAY_HAVE_VALUE = {"--mesh": is_mesh_spec, "--profile": is_profile_steps}


def _join_values(arguments: Sequence[str]) -> list[str]:
    """`--mesh SPEC` → `--mesh=SPEC` and a bare `--mesh` → `--mesh=`, so that no other word is taken for a SPEC."""
    joined: list[str] = []
    for word in arguments:
        takes = _MAY_HAVE_VALUE.get(joined[-1]) if joined else None
        if takes is not None:
            joined[-1] += "="
            if takes(word):
                joined[-1] += word
                continue
        joined.append(word)
    return [*joined[:-1], f"{joined[-1]}="] if joined and joined[-1] in _MAY_HAVE_VALUE else joined


def _split_command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The command (default train) and the others; only --mesh, --profile and overrides may stand before it."""
    for index, word in enumerate(arguments):
        if word.startswith(("--mesh=", "--profile=")) or _OVERRIDE.fullmatch(word):
            continue
        if word in COMMANDS:
            return word, [*arguments[:index], *arguments[index + 1 :]]
        looks_like_config = (
            word.startswith(("-", "package:")) or word.endswith((".yaml", ".yml")) or Path(word).is_file()
        )
        if not looks_like_config and word not in ALL_KEYS:
            hint = nearest(word, COMMANDS) or f" (commands: {', '.join(COMMANDS)})"
            raise UserError(f"{word}: no such command or config file{hint}")
        break
    return "train", list(arguments)


def _parse(name: str, arguments: Sequence[str]) -> Request:
    parser = _command_parser(name, with_help="-h" in arguments or "--help" in arguments)
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        option = unknown[0].partition("=")[0]
        known = [flag for action in parser._actions for flag in action.option_strings]
        raise UserError(f"{name}: {option}: no such option{nearest(option, known)} (see {parser.prog} --help)")
    overrides = tuple(word for word in rest if _OVERRIDE.fullmatch(word))
    mesh_word = next((word for word in overrides if re.match(r"(data|fsdp|context|tensor)=", word)), None)
    if mesh_word:
        raise UserError(
            f"{mesh_word}: wanted section.key=value; sizes of mesh axes are whole numbers right after --mesh"
        )
    mesh = options.mesh if COMMANDS[name].takes_mesh else None
    return Request(
        options=options,
        words=tuple(word for word in rest if word not in overrides),
        overrides=overrides,
        mesh=None if mesh is None else parse_mesh(mesh),
    )


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether the error, or one that it came from, is a full disk; libraries below us wrap it in types of their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if os.strerror(errno.ENOSPC) in str(error) or os.strerror(errno.EFBIG) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; one of several processes that fails ends all of them."""
    try:
        code = _run(arguments)
    except BaseException as error:
        if not peers.watched():
            raise
        traceback.print_exc()
        peers.leave(1, f"{type(error).__name__}: {error}")
        raise
    if code == 0:
        peers.finish()
    return code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        words, job = take_job_options(sys.argv[1:] if arguments is None else arguments)
        peers.COMMAND[:] = words
        name, rest = _split_command(_join_values(words))
        if job and not COMMANDS[name].takes_mesh:
            raise UserError(f"{name} runs in one process: it takes no --coordinator, --processes and --process")
        os.environ.update(job)
        if words == ["--version"]:
            print(__version__)
            return 0
        if name == "train" and "train" not in words and ("-h" in rest or "--help" in rest):
            print(_program_help())
            return 0
        COMMANDS[name].run(_parse(name, rest))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        peers.leave(2, f"error: {error}")
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        peers.leave(stopped.exit_code, str(stopped))
        return stopped.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        peers.leave(130, "interrupted")
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough; without this the interpreter would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        peers.leave(1, "its standard output was closed")
        return 0
    except (OSError, RuntimeError, ValueError) as error:
        if _is_disk_full(error):
            said = "the disk is full, or a limit on the size of files (ulimit -f) is met"
            print(f"error: {said}: {error}. Free some space and run the same command again.", file=sys.stderr)
        elif "RESOURCE_EXHAUSTED" in str(error):  # jax's word for a device without room
            said = str(error).partition("\n")[0].rstrip(".")
            print(f"error: the device's memory does not suffice: {said}. {MEMORY_LEVERS}", file=sys.stderr)
        else:
            if _RUNTIME.match(str(error)):
                peers.await_verdict()  # a collective fails where another process ends
            raise
        peers.leave(2, f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
