"""Execute docs/notebooks/NAME.py and write pages for the site: ``python -m tests.tools.docs_notebooks [NAME ...]``.

Into build/docs/notebooks go NAME.md, its pictures and NAME.ipynb. A cell that raises fails with its source.
"""

import base64
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.tools.docs_workplace import BUILD, ROOT, WORKPLACE, environment

SOURCES = ROOT / "docs" / "notebooks"
SECONDS = 1200  # a cell, on a busy machine; a whole notebook is meant to take two minutes of an idle core


def names() -> list[str]:
    """Notebooks are the sources in percent format; the folder's other Python file is the site's hook."""
    return sorted(path.stem for path in SOURCES.glob("*.py") if "# %%" in path.read_text(encoding="utf-8"))


def execute(name: str) -> NotebookNode:
    """The notebook with its outputs."""
    os.environ.update(environment(), PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = jupytext.read(SOURCES / f"{name}.py")
    where = {"metadata": {"path": str(WORKPLACE)}}
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        resources=where,
        extra_arguments=["--log-level=ERROR"],
        coalesce_streams=True,
    )
    return client.execute()


def write(name: str, notebook: NotebookNode, folder: Path) -> None:
    """NAME.md with its pictures in NAME_files, and NAME.ipynb."""
    (folder / f"{name}_files").mkdir(parents=True, exist_ok=True)
    jupytext.write(notebook, folder / f"{name}.ipynb")
    title, *cells = notebook.cells
    heading, _, text = title.source.partition("\n")
    note = f"[Notebook with outputs]({name}.ipynb), made from `docs/notebooks/{name}.py` by `make docs`."
    parts = [heading, note, text]
    for number, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        else:
            parts.append(f"```python\n{cell.source}\n```")
            parts.extend(_outputs(cell, f"{name}_files/{number}", folder))
    (folder / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _outputs(cell: NotebookNode, picture: str, folder: Path) -> Iterator[str]:
    """What a cell printed and drew; what it wrote to its error stream is for the log."""
    for index, output in enumerate(cell.outputs):
        data = output.get("data", {})
        if output.output_type == "stream":
            if output.name == "stdout":
                yield f"```text\n{output.text.rstrip()}\n```"
        elif "image/png" in data:
            path = f"{picture}_{index}.png"
            (folder / path).write_bytes(base64.b64decode(data["image/png"]))
            yield f"![Output of the cell above]({path})"
        elif "text/plain" in data:
            yield f"```text\n{data['text/plain']}\n```"


def main(chosen: list[str]) -> None:
    for name in chosen or names():
        start = time.perf_counter()
        write(name, execute(name), BUILD / "notebooks")
        print(f"{name}: executed in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
