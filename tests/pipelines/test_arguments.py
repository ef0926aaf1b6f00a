"""What a person reads who asks for help or mistypes a verb."""

import argparse

import pytest

from pipelines.__main__ import VERBS, main
from pipelines.arguments import build_parser


def parsers():
    (verbs,) = (one for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction))
    return verbs.choices


def test_each_verb_has_a_handler_and_each_option_a_help_text():
    assert parsers().keys() == VERBS.keys()
    for verb, parser in parsers().items():
        for action in parser._actions:
            plain = not action.option_strings and (action.choices or action.metavar)
            assert action.help or plain, f"{verb} {action.dest}"
            if action.option_strings and action.default not in (None, False, [], argparse.SUPPRESS):
                assert "default" in str(action.help), f"{verb} {action.dest}"


@pytest.mark.parametrize("verb", parsers())
def test_the_example_of_each_verb_parses(verb):
    example = parsers()[verb].epilog.removeprefix("Example: python -m pipelines ").split()
    assert build_parser().parse_args(example).verb == verb


def test_without_a_verb_the_help_is_printed(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pipelines"])
    main()
    shown = capsys.readouterr().out
    assert shown == build_parser().format_help()
    assert all(f"    {verb} " in shown for verb in VERBS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("runn", "runn is not known; did you mean run?"),
        ("compre champion", "compre is not known; did you mean compare?"),
        ("run --presett=x", "--presett is not known; did you mean --preset?"),
        ("predict a --treshold 1", "--treshold is not known; did you mean --threshold?"),
        ("ui mlfow", "mlfow is not known; did you mean mlflow?"),
        ("zzz", "invalid choice: 'zzz' (choose from"),
        ("predict", "the following arguments are required: IMAGE_OR_FOLDER"),
    ],
)
def test_what_was_probably_meant_is_named(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(words.split())
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
