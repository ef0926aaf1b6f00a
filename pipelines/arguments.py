"""What the command line takes: `python -m pipelines VERB`, its options, their defaults, an example of each verb."""

import argparse
import difflib
import re
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

PORTS = {"prefect": 4200, "mlflow": 5000, "docs": 8000, "dataset": 8001}


class Parser(argparse.ArgumentParser):
    """One that names the verb or option that was probably meant."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"(?:invalid choice: '|unrecognized arguments: )([^\s'=]+)", message)
        if wrong and (meant := difflib.get_close_matches(wrong[1], self.known_words(), 1)):
            message = f"{wrong[1]} is not known; did you mean {meant[0]}?"
        super().error(message)

    def known_words(self) -> list[str]:
        found = [*self._option_string_actions]
        for action in self._actions:
            for choice in action.choices or ():
                found.append(str(choice))
                if isinstance(action, argparse._SubParsersAction):
                    found += action.choices[choice]._option_string_actions
        return found


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m pipelines",
        description="Train, evaluate, register and serve DETR, on your data.",
        epilog="`python -m pipelines VERB --help` shows the options of a verb, and an example.",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=20),
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB [OPTION]", title="verbs")
    add_run_verbs(verbs)
    add_model_verbs(verbs)
    add_server_verbs(verbs)
    return parser


def add_verb(verbs: Any, name: str, text: str, example: str) -> Any:
    described = f"{text[0].upper()}{text[1:]}."
    return verbs.add_parser(name, help=text, description=described, epilog=f"Example: python -m pipelines {example}")


def add_run_verbs(verbs: Any) -> None:
    text = "run the pipeline as a Prefect flow"
    one = add_verb(verbs, "run", text, "run --set train.epochs=2 --set train.batch_size=8")
    add_overrides(one)
    one.add_argument("--refresh", action="store_true", help="download again: the source's content has changed")
    text = "check the parameters, and print them as they would be used"
    add_overrides(add_verb(verbs, "params", text, "params --preset finetune"))
    text = "print the versions of the data, or what changed between two"
    one = add_verb(verbs, "data", text, "data HEAD~1")
    one.add_argument("old", nargs="?", metavar="OLD", help="a commit; without it, all versions are listed")
    one.add_argument("new", nargs="?", metavar="NEW", help="a commit; without it, the working tree")
    one.add_argument("--json", action="store_true", help="print JSON")


def add_overrides(one: Any) -> None:
    one.add_argument("--preset", metavar="NAME", help="a file of presets/, merged over params.yaml for this run")
    one.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="a parameter for this run alone; can be given again",
    )  # fmt: skip


def add_model_verbs(verbs: Any) -> None:
    text = "detect objects in pictures with a registered model"
    one = add_verb(verbs, "predict", text, "predict photos --threshold 0.3")
    one.add_argument("paths", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    one.add_argument("--model", default="champion", help="an alias or the number of a version (default: %(default)s)")
    one.add_argument(
        "--threshold", type=float, default=0.5, help="lowest score that is shown, 0 to 1 (default: %(default)s)"
    )
    one.add_argument(
        "--output", type=Path, default=Path("scratch/predictions"), help="folder of the results (default: %(default)s)"
    )
    one = add_verb(verbs, "compare", "compare registered versions", "compare champion 3")
    one.add_argument("versions", nargs="*", help="aliases or numbers; without any, champion and challenger")
    add_verb(verbs, "rollback", "make the previous champion the champion again", "rollback")
    text = "make a registered version again, and say whether it is the same"
    one = add_verb(verbs, "reproduce", text, "reproduce champion")
    one.add_argument("model", help="models:/detr/3, models:/detr@champion, or only 3 or champion")
    one = add_verb(verbs, "table", "print the paper's table as it is on this machine", "table --quick")
    one.add_argument("--quick", action="store_true", help="fewer and smaller measurements")


def add_server_verbs(verbs: Any) -> None:
    one = add_verb(verbs, "ui", "serve a user interface on 127.0.0.1", "ui mlflow --port 5001")
    one.add_argument("which", choices=list(PORTS))
    one.add_argument("--port", type=int, help=f"default: {', '.join(f'{port} for {ui}' for ui, port in PORTS.items())}")
    text = "start the servers, the deployments and a worker in the background"
    one = add_verb(verbs, "up", text, "up --prefect-port 4201")
    for name in ("prefect", "mlflow"):
        one.add_argument(f"--{name}-port", type=int, default=PORTS[name], help="default: %(default)s")
    one.add_argument(
        "--host", default="127.0.0.1",
        help="name or address to serve at (default: %(default)s); there is no authentication",
    )  # fmt: skip
    add_verb(verbs, "down", "stop all that `up` has started", "down")
    text = "make work pool, queue and automations on the server of PREFECT_API_URL"
    one = add_verb(verbs, "automate", text, "automate --deploy")
    one.add_argument("--deploy", action="store_true", help="deploy prefect.yaml; a schedule that is on stays on")
    one.add_argument("--resume", action="store_true", help="have runs that died go on; no worker may be alive")
