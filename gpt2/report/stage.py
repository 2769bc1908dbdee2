"""The report stage. `python -m gpt2.report DIRECTORY`

Reads the directories of the earlier stages and writes report.md, report.html (self-contained) and plots/*.png.
"""

from __future__ import annotations

from gpt2.atomic import atomic_write, write_text
from gpt2.config import strict_yaml
from gpt2.report import benchmarks, compare, format, headline, markdown, page, reproduce, sections
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
    plots = {f"plots/{plot.name}.png": plot for plot in draw(run)}
    for path, plot in plots.items():
        with atomic_write(directory.path / path) as file:
            file.write(png(plot))
    modules = (format, benchmarks, compare, headline, sections, reproduce)
    text = markdown.render("report.md.jinja", modules, run=run, plots=plots, yaml=strict_yaml.dump)
    html = page.render(text, run.report.title, {path: svg(plot) for path, plot in plots.items()})
    write_text(directory.path / "report.md", text)
    write_text(directory.path / "report.html", html)
    directory.finish(["report.md", "report.html", *plots], ReportFacts(headline=headline.headline(run)))
    print(f"report: {directory.path / 'report.html'}", flush=True)
