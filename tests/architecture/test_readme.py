"""What the README shows must run, and print what it says."""

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_python_of_the_readme_runs():
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code) == 1
    told = io.StringIO()

    with contextlib.redirect_stdout(told):
        exec(compile(code[0], "README.md", "exec"), {})

    lines = told.getvalue().splitlines()
    assert len(lines) == 7
    assert lines[-1] == "14.7 B parameters"
