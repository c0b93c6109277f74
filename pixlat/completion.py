"""Shell completion: `pixlat completion bash|zsh` prints a script, which asks `pixlat complete LINE` what may follow.

It completes commands, their actions, methods and presets (those of plug-ins as well), keys, and names of files. It must
answer between two key strokes and therefore imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pixlat import cli
from pixlat.common.command_line import HELP_WORDS

if TYPE_CHECKING:
    from pixlat.evaluation.command import Syntax
    from pixlat.methods import MethodSpec

USAGE = """\
pixlat completion: a script that completes commands, methods, presets and keys

  source <(pixlat completion bash)     in ~/.bashrc
  source <(pixlat completion zsh)      in ~/.zshrc, below `autoload -U compinit && compinit`
"""
# Bash splits the line into words at "=" and ":" as well (COMP_WORDBREAKS), and replaces only what is behind the last
# of them. The script therefore hands over the line as it was typed, and cuts the part before off the answers.
BASH = r"""# pixlat completion for bash: source <(pixlat completion bash)
_pixlat() {
    local line="${COMP_LINE:0:COMP_POINT}" word answer cut=""
    word="${line##*[[:space:]]}"
    [[ $word == *=* && $COMP_WORDBREAKS == *=* ]] && cut="${word%"${word##*=}"}"
    if [[ $word == *:* && $COMP_WORDBREAKS == *:* && ${#cut} -lt $((${#word} - ${#word##*:})) ]]; then
        cut="${word%"${word##*:}"}"
    fi
    COMPREPLY=()
    while IFS= read -r answer; do
        [[ -n $answer ]] && COMPREPLY+=("${answer#"$cut"}")
    done < <("${COMP_WORDS[0]}" complete "$line" 2>/dev/null)
    # A key waits for its value and a folder for what is in it, so that no space follows.
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=/.] ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o nosort -F _pixlat pixlat
"""
ZSH = r"""#compdef pixlat
# pixlat completion for zsh: source <(pixlat completion zsh)
_pixlat() {
    local -a answers open closed
    answers=("${(@f)$("${words[1]}" complete "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    answers=(${answers:#})
    open=(${(M)answers:#*[=/.]})
    closed=(${answers:#*[=/.]})
    # A key waits for its value and a folder for what is in it, so that no space follows.
    (( $#open )) && compadd -Q -S '' -- $open
    (( $#closed )) && compadd -Q -- $closed
    (( $#answers ))
}
compdef _pixlat pixlat
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH}
DATA = ("emoji32", "folder", "tar", "parquet", "arrow", "shards", "synthetic")
CLUSTERS = ("here", "local", "slurm")
# The last part of keys whose values are files or folders.
PATHS = (
    "path", "run", "runs", "checkpoint", "images", "npz", "against", "weights", "reference", "out", "to", "from",
    "file", "results", "readme", "latents", "tokenizer_path",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the script of a shell. Returns the exit code: 2 for a shell without one."""
    name, *_ = [*(sys.argv[1:] if arguments is None else arguments), HELP_WORDS[0]]
    if name in HELP_WORDS:
        return cli.say(USAGE)
    return (
        cli.say(SCRIPTS[name])
        if name in SCRIPTS
        else cli.refuse(f"there is no completion for {name!r}.", name, list(SCRIPTS))
    )


def main_complete(arguments: Sequence[str] | None = None) -> int:
    """Prints the words that the last word of a line may become. The argument is the line up to the cursor."""
    given = sys.argv[1:] if arguments is None else arguments
    for candidate in candidates(" ".join(given)):
        print(candidate)
    return 0


def candidates(line: str) -> list[str]:
    """The words that the last word of a line, which may be empty, may become. The line begins with the program."""
    words = split_line(line)
    before, word = words[1:-1], words[-1]
    return [each for each in possible(before, word) if each.startswith(word)]


def split_line(line: str) -> list[str]:
    """The words of a line, the unfinished last one included: it is empty behind a space."""
    try:
        words = shlex.split(line)
    except ValueError:  # a quotation mark that is still open
        words = line.split()
    return [*words, ""] if len(words) < 2 or line[-1:].isspace() else words


def possible(before: Sequence[str], word: str) -> Iterator[str]:
    """Every word that may follow the words before; of values and files only those that begin as `word` does."""
    if not before:
        yield from (name for name, command in cli.COMMANDS.items() if command.group or word)
        return
    name, *rest = before
    if name in HELP_WORDS:
        yield from (each for each, command in cli.COMMANDS.items() if command.group)
    elif name == "completion":
        yield from SCRIPTS
    elif name == "study":
        yield from follow_action(cli.STUDIES, rest, word)
    elif "=" in name:
        yield from follow(cli.COMMANDS["train"].load_syntax(), before, word)
    elif name in cli.COMMANDS:
        yield from follow(cli.COMMANDS[name].load_syntax(), rest, word)


def follow_action(table: Mapping[str, cli.Command], rest: Sequence[str], word: str) -> Iterator[str]:
    """What may follow `pixlat study`: a study, and what it takes."""
    if not rest:
        yield from table
    elif rest[0] in table:
        yield from follow(table[rest[0]].load_syntax(), rest[1:], word)


def follow(syntax: Syntax | None, given: Sequence[str], word: str) -> Iterator[str]:
    """What may follow the arguments of a command: an action, a key that is not there yet, a value, or a file."""
    if syntax is None:
        return
    if syntax.actions:
        if not given:
            yield from syntax.actions
        elif given[0] in syntax.actions:
            own, given = syntax.actions[given[0]], given[1:]
            syntax = dataclasses.replace(own, keys=own.keys if dataclasses.fields(own.keys) else syntax.keys)
    key, equals, value = word.partition("=")
    kinds = kinds_of(syntax, given)
    if equals:
        yield from (f"{key}={each}" for each in values(key, kinds[key], value, given)) if key in kinds else ()
        return
    there = {each.partition("=")[0] for each in given}
    yield from (f"{key}=" for key in kinds if key not in there)
    yield from ("--help",) if word.startswith("-") else ()
    if syntax.paths and not word.startswith("-"):
        yield from files(word)


# -- keys --------------------------------------------------------------------------------------------------------------


def kinds_of(syntax: Syntax, given: Sequence[str]) -> dict[str, str]:
    """The keys of a command with their types: its own, and those of a run's configuration that it takes."""
    from pixlat.common.config.resolve import GROUPS_WITH_NAME
    from pixlat.common.config.schema import RunConfig

    kinds = {key.removesuffix("_"): kind for key, kind in fields_of(syntax.keys)}
    for key, kind in fields_of(RunConfig):
        group = key.partition(".")[0]
        if group not in syntax.groups:
            continue
        if group in ("model", "sample"):
            spec = spec_of(given)
            kinds |= dict(fields_of(spec.config if group == "model" else spec.sample, group)) if spec else {}
        else:
            kinds |= {group if group in GROUPS_WITH_NAME and key == f"{group}.name" else key: kind}
    return kinds


def fields_of(config: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, type) of a configuration's fields, nested ones expanded. Reads no help, for which sources are parsed."""
    from pixlat.common.config import explain

    yield from ((key, explain.type_name(item.type)) for key, item, _, _ in explain.fields_of(config, prefix))


def spec_of(given: Sequence[str]) -> MethodSpec | None:
    """The method that the arguments name, or that of the run that they name; None if it is not known."""
    from pixlat.common.config.schema import RunConfig
    from pixlat.common.errors import UserError
    from pixlat.methods import get_spec

    settings = dict(each.split("=", 1) for each in given if "=" in each)
    name = settings.get("method") or method_of(settings.get("run")) or RunConfig.method
    try:
        return get_spec(name.partition(",")[0])
    except UserError:
        return None


def method_of(folder: str | None) -> str:
    """The method of a run folder, read from its config.yaml; empty if there is none."""
    try:
        text = (Path(folder).expanduser() / "config.yaml").read_text(encoding="utf-8") if folder else ""
    except (OSError, ValueError):
        return ""
    found = re.search(r"^method: *(\w+)", text, flags=re.MULTILINE)
    return found[1] if found else ""


# -- values ------------------------------------------------------------------------------------------------------------


def values(key: str, kind: str, value: str, given: Sequence[str]) -> Iterator[str]:
    """The values of a key, as far as they are known, or files. Of a comma list the last one is completed."""
    known: dict[str, Callable[[], Iterable[str]]] = {
        "method": method_names,
        "preset": lambda: preset_names(given),
        "protocol": protocol_names,
        "data": lambda: DATA,
        "cluster": lambda: CLUSTERS,
    }
    if key in known:
        head, comma, _ = value.rpartition(",")
        yield from (f"{head}{comma}{each}" for each in known[key]())
    elif kind.startswith("bool"):
        yield from ("true", "false")
    elif kind.startswith("str") and (key.rpartition(".")[2] in PATHS or key in stage_keys(given)):
        yield from files(value)


def method_names() -> Iterable[str]:
    """All methods, those of plug-ins as well."""
    from pixlat.methods import registered

    return sorted(registered())


def preset_names(given: Sequence[str]) -> Iterable[str]:
    """The presets of the method that the arguments name."""
    spec = spec_of(given)
    return (
        re.findall(r"^([\w.-]+):", Path(spec.presets).read_text(encoding="utf-8"), flags=re.MULTILINE) if spec else ()
    )


def protocol_names() -> Iterable[str]:
    """The evaluation protocols."""
    from pixlat.evaluation.protocols.named import EMBEDDED, PROTOCOLS

    return EMBEDDED, *PROTOCOLS


def stage_keys(given: Sequence[str]) -> list[str]:
    """The keys that name the run folder of an earlier stage."""
    spec = spec_of(given)
    return [f"model.{stage.key}" for stage in spec.stages] if spec else []


def files(start: str) -> Iterator[str]:
    """The files and folders whose path begins so. Folders end in a slash; hidden files need their dot typed."""
    head, slash, name = start.rpartition("/")
    folder = Path(head + slash or ".").expanduser()
    try:
        found = sorted(folder.iterdir())
    except OSError:
        return
    for each in found:
        if each.name.startswith(name) and (name.startswith(".") or not each.name.startswith(".")):
            yield f"{head}{slash}{each.name}{'/' if each.is_dir() else ''}"
