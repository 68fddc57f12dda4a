"""A test that sends a signal to its child must not depend on who started pytest: nohup, `pytest &` in a script and some
CI ignore signals, and what is ignored stays so in every child."""

import signal


def heard() -> None:
    """For a child's preexec_fn: what it ignored because its parent did, it hears."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
