"""Render the help of every command as one page: ``python -m subspec.cli.reference > docs/cli.md``."""

from typer.main import get_command

from subspec.cli.main import app

WIDTH = 100
_HEAD = """\
# The command line

What `--help` prints, for reading without an installation. A test keeps this page true; renew it with
`python -m subspec.cli.reference > docs/cli.md`.

Exit status: 0 success, 1 a check that failed (`demo` and `bench`: different tokens), 2 an error you can mend
(one line `error: …` says how; after a mistyped option, its usage), 130 interrupted.
"""


def render() -> str:
    """The page, at a fixed width whatever the terminal's is."""
    root = get_command(app)
    context = root.make_context("subspec", [], resilient_parsing=True, terminal_width=WIDTH)
    pages = [_HEAD, _section("subspec", root.get_help(context))]
    for name, command in getattr(root, "commands", {}).items():
        inner = command.make_context(name, [], parent=context, resilient_parsing=True, terminal_width=WIDTH)
        pages.append(_section(f"subspec {name}", command.get_help(inner)))
    return "\n".join(pages)


def _section(title: str, text: str) -> str:
    lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return f"## {title}\n\n```text\n{lines}\n```\n"


if __name__ == "__main__":
    print(render(), end="")
