"""Runs exercises/lab.ipynb and writes its outputs, text and figures, into it.

No Jupyter: the code cells are run in order in one namespace, standard output and what plt.show
shows are kept. So a cell ends with print or plt.show, never with a value to be displayed.
Run: python -m exercises.teacher.run_lab    (about half a minute)
"""

import argparse
import base64
import contextlib
import io
import json
import sys
from pathlib import Path

import torch

NOTEBOOK = Path(__file__).resolve().parent.parent / "lab.ipynb"
DPI = 72  # the figures are committed


def lines(text):
    """A text as the format has it: a list of lines that keep their ends."""
    return text.splitlines(keepends=True)


def picture(figure):
    """The output that shows a figure."""
    file = io.BytesIO()
    # Without the version of the library: the same figure is the same bytes.
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    data = base64.b64encode(file.getvalue()).decode()
    width, height = figure.get_size_inches()
    text = f"<Figure of {width:g} by {height:g} inches>"
    return dict(
        output_type="display_data",
        data={"image/png": data + "\n", "text/plain": [text]},
        metadata={},
    )


def run_cell(source, name, namespace):
    """Runs a code cell. Returns its outputs in order.

    namespace:
        the names of the cells before, to which it adds its own.
    """
    import matplotlib.pyplot as plt

    text, outputs = io.StringIO(), []

    def keep_text():
        if text.getvalue():
            stream = dict(output_type="stream", name="stdout", text=lines(text.getvalue()))
            outputs.append(stream)
        text.seek(0)
        text.truncate()

    def show(*_, **__):
        keep_text()
        outputs.extend(picture(plt.figure(number)) for number in plt.get_fignums())
        plt.close("all")

    shown_by, plt.show = plt.show, show
    try:
        with contextlib.redirect_stdout(text):
            exec(compile(source, name, "exec"), namespace)
    finally:
        plt.show = shown_by
        plt.close("all")
    keep_text()
    return outputs


def run(notebook, folder):
    """Fills in the outputs of every code cell of a notebook, a dictionary.

    folder:
        where it lies: its paths are relative to that.
    """
    import matplotlib

    matplotlib.use("Agg")  # no window
    namespace = {"__name__": "lab"}
    path = list(sys.path)
    count = 0
    try:
        with contextlib.chdir(folder):
            for cell in notebook["cells"]:
                if cell["cell_type"] == "code":
                    count += 1
                    name = f"cell {count} of {NOTEBOOK.name}"
                    cell["outputs"] = run_cell("".join(cell["source"]), name, namespace)
                    cell["execution_count"] = count
    finally:
        sys.path[:] = path  # the first cell adds to it


def main(argv=None):
    from bandit import one_line_errors  # here: which bandit.py is imported, the notebook says

    parser = argparse.ArgumentParser(description="Runs lab.ipynb and writes its outputs into it.")
    one_line_errors(parser, "run_lab")
    parser.add_argument(
        "--notebook", type=Path, default=NOTEBOOK, help="default exercises/lab.ipynb"
    )
    options = parser.parse_args(argv)
    try:
        notebook = json.loads(options.notebook.read_text(encoding="utf-8"))
        run(notebook, options.notebook.resolve().parent)
        # As nbformat writes it: a space for a level, and letters as they are.
        text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        options.notebook.write_text(text, encoding="utf-8")
    except OSError as error:
        parser.error(f"--notebook {options.notebook}: {error.strerror}")
    except (ValueError, KeyError):
        parser.error(f"--notebook {options.notebook}: is no notebook")
    print(f"{sum(cell['cell_type'] == 'code' for cell in notebook['cells'])} cells run")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are tiny
    raise SystemExit(main())
