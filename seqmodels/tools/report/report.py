"""A report put together: its files, its page, and a section of a document."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from seqmodels.errors import InputError, nearest
from seqmodels.files import in_bucket, to_path, told, write_file
from seqmodels.tools._documents import put_section
from seqmodels.tools.report import draw, page, tables
from seqmodels.tools.report.pictures import HeatMaps, Picture, pictures
from seqmodels.tools.report.points import Sweep
from seqmodels.tools.report.selection import Row, conditions, dates, select
from seqmodels.training.metrics import less_is_better

Pictures = Mapping[str, bytes]


class Report(NamedTuple):
    """What there is to tell of a sweep."""

    sweep: Sweep
    rows: Sequence[Row]
    pictures: Sequence[Picture | HeatMaps]

    @classmethod
    def of(cls, sweep: Sweep) -> "Report":
        rows = select(sweep)
        return cls(sweep, rows, pictures(sweep, rows))

    def caption(self, name: str) -> str:
        return next(picture.caption for picture in self.pictures if picture.name == name)

    @property
    def question(self) -> str:
        return "\n".join(line.removeprefix("#").removeprefix(" ") for line in self.sweep.question).strip()

    @property
    def state(self) -> str:
        """How many points have come how far."""
        counts = Counter(point.status for point in self.sweep.points)
        parts = [f"{count} {status}" for status, count in counts.items()]
        points = len(self.sweep.points)
        return f"{points} {'point' if points == 1 else 'points'}: {', '.join(parts)}"

    @property
    def reading(self) -> str:
        """How the summary is to be read."""
        sweep = self.sweep
        better = "less" if less_is_better(sweep.metric) else "more"
        lines = [f"Metric: {sweep.metric} on held-out data after the last step; {better} is better."]
        if sweep.best_of:
            names = " and ".join(sweep.best_of)
            lines.append(f"Each row is at its best {names}; (edge): the least or the largest that was tried.")
        if sweep.seed:
            lines.append(f"Over {len(sweep.order[sweep.seed])} seeds: the mean, and from the least to the most.")
        if any(row.points and row.points[0].state_grows for row in self.rows):
            lines.append("A state that grows is given after the length of training.")
        return " ".join(lines)

    @property
    def conditions(self) -> list[str]:
        """On what it ran, when, and for how long."""
        seconds = self.sweep.seconds
        hours = f" ({seconds / 3600:,.1f} hours)" if seconds > 3600 else ""
        time = f"{seconds:,.0f} seconds of compute{hours}, all points together"
        return [*conditions(self.sweep), *filter(None, [dates(self.sweep)]), *([time] if seconds else [])]

    @property
    def commands(self) -> str:
        sweep = f"python -m seqmodels.tools.sweep {self.sweep.file} --sweep_dir DIR"
        return f"{sweep}\npython -m seqmodels.tools.report DIR"

    def text(self) -> str:
        """For a terminal."""
        missing = [f"  {line}" for line in tables.not_finished(self.sweep)]
        return "\n".join([self.state, *missing, "", tables.as_text(tables.summary_cells(self.sweep, self.rows))])

    def markdown(self, links: Mapping[str, str]) -> list[str]:
        """Paragraphs. links: the files of the pictures, from where the text will be."""
        missing = "\n".join(f"- {line}" for line in tables.not_finished(self.sweep))
        return [
            *([f"```\n{self.question}\n```"] if self.question else []),
            tables.as_markdown(tables.summary_cells(self.sweep, self.rows)),
            self.reading,
            f"{self.state}{'. Not finished:' if missing else '.'}",
            *([missing] if missing else []),
            *(f"![{self.caption(name)}]({link})" for name, link in links.items()),
            f"```\n{self.commands}\n```",
            *(["\n".join(f"- {line}" for line in self.conditions)] if self.conditions else []),
        ]

    def html(self, drawn: Pictures) -> str:
        sweep, rows = self.sweep, self.rows
        summary, points = tables.summary(sweep, rows), tables.points(sweep, times=True)
        titled = points._replace(columns=[tables.TITLES.get(x, x) for x in points.columns])
        missing = tables.not_finished(sweep)
        parts = [
            *([page.verbatim(self.question)] if self.question else []),
            page.paragraph(f"{self.state}."),
            *([page.heading("Not finished"), page.bullets(missing)] if missing else []),
            page.heading("Summary"),
            page.paragraph(self.reading),
            page.table(tables.summary_cells(sweep, rows), _behind(summary, sweep)),
            *([page.heading("Pictures")] if drawn else []),
            *(page.picture(self.caption(name), png) for name, png in drawn.items()),
            page.heading("All points"),
            page.table(tables.points_cells(sweep), titled),
            page.heading("How it was made"),
            page.verbatim(self.commands),
            page.bullets(self.conditions),
        ]
        return page.page(f"Sweep {sweep.name}", parts)


def _behind(summary: tables.Table, sweep: Sweep) -> tables.Table:
    """The summary's values under the titles that a person reads."""
    titles = {sweep.metric: f"{sweep.metric}, mean (min to max)"} if sweep.seed else {}
    return summary._replace(columns=[(titles | tables.TITLES).get(x, x) for x in summary.columns])


def choose(report: Report, names: Sequence[str] | None) -> Report:
    """The report with these pictures alone; None for all. Raises `InputError` for one that it does not have."""
    if names is None:
        return report
    there = {picture.name: picture for picture in report.pictures}
    for name in names:
        if name not in there:
            raise InputError(f"--pictures has {name!r}, which this report does not have; {nearest(name, there)}")
    return report._replace(pictures=[there[name] for name in dict.fromkeys(names)])


def write(report: Report, out: str | os.PathLike) -> Pictures:
    """All files of a report, into a folder that is made; returns the pictures by name."""
    if report.pictures:
        draw.check()
    drawn = {picture.name: draw.png(picture) for picture in report.pictures}
    out = to_path(out)
    if not in_bucket(out):
        with told(f"cannot write {out}", out, expected="a writable folder"):
            out.mkdir(parents=True, exist_ok=True)
    files = {
        **{f"{name}.png": png for name, png in drawn.items()},
        "points.csv": tables.as_csv(tables.points(report.sweep, times=True)),
        "results.csv": tables.as_csv(tables.points(report.sweep, times=False)),
        "summary.csv": tables.as_csv(tables.summary(report.sweep, report.rows)),
        "report.md": "\n\n".join(
            [f"# Sweep {report.sweep.name}", *report.markdown({name: f"{name}.png" for name in drawn})]
        )
        + "\n",
        "report.html": report.html(drawn),
    }
    for name, content in files.items():
        write_file(out / name, content)
    return drawn


def section(report: Report, drawn: Pictures, file: Path) -> None:
    """The report as a section of a document, its pictures beside it under the document's name."""
    links = {name: f"{file.stem}_{name}.png" for name in drawn}
    for name, png in drawn.items():
        write_file(file.parent / links[name], png)
    parts = [f"## {report.sweep.name}", *report.markdown(links)]
    put_section(file, report.sweep.name, parts, start=f"# {file.stem.replace('_', ' ').capitalize()}\n")
