"""A command of ``qpeft`` in this process."""

from qpeft_ext.cli import main


def run_command(capsys, *arguments) -> str:
    """Return its stdout; it must succeed, with nothing on stderr."""
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert err == "", err
    return out
