"""The `lsp-agent` command: a click group that imports a subcommand only when it is run."""

from __future__ import annotations

import importlib
import sys

import click

from lsp_agent import __version__
from lsp_agent.errors import Cancelled, ExitCode, UserError

# name -> (module:attribute, help line shown by `lsp-agent --help` without importing the module)
COMMANDS = {
    "fix": ("lsp_agent.commands.fix:fix", "Make failing tests pass, with proof, and show the diff."),
    "undo": ("lsp_agent.commands.undo:undo", "Restore the state before a run."),
    "serve": ("lsp_agent.commands.serve:serve", "Run the language server that editors talk to."),
    "model": ("lsp_agent.commands.model:model", "List, install, inspect and remove models."),
    "engine": ("lsp_agent.commands.engine:engine", "Start, stop and inspect the process that runs the models."),
    "generate": ("lsp_agent.commands.generate:generate", "Run the model on a prompt."),
    "eval": ("lsp_agent.commands.evaluate:evaluate", "Measure the agent on executable tasks."),
    "bench": ("lsp_agent.commands.bench:bench", "Measure what this machine does with a model, weights or not."),
    "doctor": ("lsp_agent.commands.doctor:doctor", "Say what this machine has and what would be used."),
}


class LazyGroup(click.Group):
    """A click group over `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Names in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import and return one subcommand."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the help table without importing any subcommand."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lsp-agent")
def app() -> None:
    """Agentic code actions for every editor, over plain LSP, with a private model on your own machine."""


def main() -> None:
    """Run the command line; user errors become one sentence on stderr and their exit code."""
    try:
        code = app.main(standalone_mode=False)
    except UserError as error:
        if _interrupted(error):
            click.echo("lsp-agent: cancelled.", err=True)
            sys.exit(ExitCode.CANCELLED)
        click.echo(f"lsp-agent: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (Cancelled, click.Abort, KeyboardInterrupt):
        click.echo("lsp-agent: cancelled.", err=True)
        sys.exit(ExitCode.CANCELLED)
    sys.exit(code if isinstance(code, int) else ExitCode.OK)


def _interrupted(error: BaseException) -> bool:
    """Whether `error` arose while a Ctrl-C was on its way: libraries' clean-up can fail then and hide it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, KeyboardInterrupt):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
