"""The two ways a command may end other than by finishing: bad input, and a requested stop."""

from rethinker_jax.terminal import printable


class UserError(Exception):
    """Input that cannot be used. `main` prints the message alone and exits with 2.

    The message says what was wanted, what came, where (file, row, key), and what to do. What it quotes of files and
    models cannot reach the terminal as a control sequence.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


class Stopped(Exception):
    """The run was asked to stop and has saved what it had. `exit_code` is 75 (preempted) or 130 (interrupted)."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code
