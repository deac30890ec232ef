import json
import subprocess
import sys

from msquant.inference.launch import Launch

PROGRAM = "import json, os, sys; print(json.dumps([os.environ['ODD'], sys.argv[1:]]))"
ODD = 'it\'s $HOME `id` "quoted"\nsecond line'
LAUNCH = Launch((sys.executable, "-c", PROGRAM, "a b", "$(id)", ""), {"ODD": ODD})


def test_shell_lines_do_what_the_launch_does() -> None:
    pasted = subprocess.run(["sh", "-c", LAUNCH.shell()], capture_output=True, text=True, check=True)
    started = subprocess.run(
        LAUNCH.argv, env=LAUNCH.environment(), capture_output=True, text=True, check=True
    )
    assert pasted.stdout == started.stdout
    assert json.loads(pasted.stdout) == [ODD, ["a b", "$(id)", ""]]


def test_environment_is_put_on_top_of_the_inherited_one() -> None:
    assert Launch(("x",), {"A": "1"}).environment({"A": "0", "B": "2"}) == {"A": "1", "B": "2"}


def test_place_is_a_comment_and_part_of_the_document() -> None:
    launch = Launch(("ray", "stop"), {"A": "1"}, place="node 1")
    assert launch.shell() == "# node 1\nexport A=1\nray stop"
    assert launch.document() == {"place": "node 1", "env": {"A": "1"}, "argv": ["ray", "stop"]}
    assert Launch(("x",)).document() == {"env": {}, "argv": ["x"]}


def test_requests_are_shown_and_not_piped() -> None:
    launch = Launch(("sh", "-c", "echo started"), requests=({"op": "load", "model": "a b"},))
    assert launch.document()["requests"] == [{"op": "load", "model": "a b"}]
    assert launch.shell().splitlines()[-1] == '# its input: {"op": "load", "model": "a b"}'
    pasted = subprocess.run(["sh", "-c", launch.shell()], capture_output=True, text=True, check=True)
    assert pasted.stdout == "started\n"
