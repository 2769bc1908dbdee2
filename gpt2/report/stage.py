"""The report stage: what came out of a run, for people. `python -m gpt2.report DIRECTORY`

Reads the directories of the earlier stages and writes report.html (one file that needs nothing else), report.md and
plots/*.png. Computes nothing new about the model; numbers come from the manifests' facts.
"""

from __future__ import annotations

from gpt2.atomic import atomic_write, write_text
from gpt2.report import html, markdown
from gpt2.report.content import document, headline
from gpt2.report.drawing import png, svg
from gpt2.report.plots import draw
from gpt2.report.run import gather
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import ReportFacts


def report(directory: StageDir) -> None:
    """Write the report of the run whose stages are `directory`'s inputs.

    Raises:
        UserError: an input stage is not finished.
    """
    run = gather(directory)
    plots = draw(run)
    pictures = {plot.name: f"plots/{plot.name}.png" for plot in plots}
    for plot in plots:
        _write_bytes(directory, pictures[plot.name], png(plot))
    page = document(run, plots)
    write_text(directory.path / "report.md", markdown.render(page, pictures))
    write_text(directory.path / "report.html", html.render(page, {plot.name: svg(plot) for plot in plots}))
    directory.finish(["report.md", "report.html", *pictures.values()], ReportFacts(headline=headline(run)))
    print(f"report: {directory.path / 'report.html'}", flush=True)


def _write_bytes(directory: StageDir, name: str, data: bytes) -> None:
    with atomic_write(directory.path / name) as file:
        file.write(data)
