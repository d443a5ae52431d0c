"""Config files, overrides and command lines → an `Experiment`.

Knows YAML and how to say what is wrong with it; knows nothing of single settings.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from train.config import Experiment


class ConfigError(ValueError):
    """A config is wrong. The message lists all faults at once."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers, for YAML 1.1 reads `3e-5` as text, `010` as 8 and `1:30` as 90; and no key twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping, and refuse one of which two values have the same name: the last would hold, unsaid."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                told = f"the key {key.value!r} stands on line {lines[key.value]} already: leave one of them"
                raise yaml.composer.ComposerError(None, None, told, key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = key.start_mark.line + 1
        return node


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][\d_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*(?:[eE][-+]?\d+)|\d[\d_]*\.[\d_]*|\.\d+(?:[eE][-+]?\d+)?|\.inf|\.nan)$"),
    list("-+0123456789."),
)


def load_experiment(path: Path | str, overrides: list[str] | None = None) -> Experiment:
    """Read a config file and apply `a.b=c` overrides.

    Raises:
        ConfigError: the file cannot be read, or settings are wrong: all faults at once.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text("utf-8"), _Loader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}. Shipped ones are in configs/") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid YAML in UTF-8: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, expected settings under top keys: see configs/")
    for override in overrides or ():
        _apply(content, override)
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        faults = "\n".join(
            f"  {'.'.join(str(part) for part in fault['loc'])}: {fault['msg']} (got {fault['input']!r})"
            if fault["loc"]
            else f"  {fault['msg']}"  # of settings together: got would be all of them
            for fault in error.errors()
        )
        raise ConfigError(f"{path} has {error.error_count()} fault(s):\n{faults}") from error


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected KEY.KEY=VALUE, e.g. fit.epochs=2")
    *parents, last = key.split(".")
    target = content
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a group of settings")
    try:
        target[last] = yaml.load(value, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {value!r} is no valid YAML: {error}") from error


def experiment_from_arguments(description: str, arguments: list[str] | None = None) -> Experiment:
    """Parse the command line that all stages share."""
    parser = stage_parser(description)
    return experiment_of(parser.parse_args(arguments), parser)


def stage_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of what all stages share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="an experiment, see configs/")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a setting; repeatable")
    return parser


def experiment_of(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Experiment:
    """Load the experiment that a command line names, or end with what is wrong with it."""
    try:
        return load_experiment(options.config, options.set)
    except ConfigError as error:
        parser.exit(2, f"{error}\n")
