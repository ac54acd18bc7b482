"""Commands that documents show, parsed by what would run them: the jobs' configs, Ray's command line."""

import re
import shlex

import click
import tyro
from ray.scripts.scripts import cli as ray_cli
from ray.serve.scripts import cli as serve_cli

from bcd import cli
from bcd.config.files.settings import fields_of
from bcd.config.options import Config

JOBS: dict[str, type[Config]] = {name: config for name, (config, _) in cli.JOBS.items()}
PROGRAMS = {"ray": ray_cli, "serve": serve_cli}


def in_markdown(text: str) -> list[str]:
    """The lines of every block marked `sh`, each command in one."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


def in_comments(text: str) -> list[str]:
    """The commands that stand indented in the comments of a YAML file or a Dockerfile."""
    joined = text.replace("\\\n#", "")
    return [match[1] for match in re.finditer(r"^#   +(.+)$", joined, re.M)]


def job(line: str) -> tuple[type[Config], list[str]] | None:
    """Config type and flags of a command that runs a job, or nothing."""
    if match := re.search(r"(?:python \S*\bjobs/(\w+)\.py|^bcd (\w+))(.*)", line):
        return JOBS[match[1] or match[2]], shlex.split(match[3], comments=True)
    return None


def check_job(config_type: type[Config], arguments: list[str]) -> Config | None:
    """Fails on a flag that the job does not have, or a value that it does not take."""
    if arguments == ["--help"]:
        return None
    if "--config" in arguments:  # whose file has what is required
        place = arguments.index("--config")
        required = [name for name, field in fields_of(config_type).items() if field.is_required()]
        arguments = arguments[:place] + arguments[place + 2 :]
        arguments += [
            word for name in required if f"--{name}" not in arguments for word in (f"--{name}", "x")
        ]
    return tyro.cli(config_type, args=arguments)


def is_rays(line: str) -> bool:
    """Whether the command is one of Ray's."""
    return line.split(maxsplit=1)[0] in PROGRAMS if line.strip() else False


def check_rays(line: str) -> click.Context:
    """Fails on a subcommand or flag that Ray does not have; nothing is run."""
    name, *arguments = shlex.split(line, comments=True)
    command: click.Command | None = PROGRAMS[name]
    while isinstance(command, click.Group):
        name, command, arguments = command.resolve_command(click.Context(command), arguments)
    assert command is not None
    return command.make_context(name, arguments)
