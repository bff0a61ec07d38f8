"""A search whose report is known, and its page read as a browser reads it."""

from html.parser import HTMLParser

from hq_optuna.report.page import write_report
from hq_optuna.space.budget import Budget
from tests.fake_search import fake_space, fake_study


def known(**more):
    """Return a search whose answer is known: both inner layers at 4 bits, the others at 8."""
    return fake_study(fake_space(4, bits=(8, 4)), budget=Budget.fraction(bops=0.32), **more)


class Page(HTMLParser):
    """Elements, text and links of a page as a browser would see them."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.ids, self.open, self.cells, self.scripts = (
            [],
            [],
            [],
            [],
            [],
            [],
        )
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        self.links += [found[key] for key in ("src", "href", "action") if key in found]
        self.ids += [found["id"]] if "id" in found else []
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts.append(data)
            return
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def page_of(study, tmp_path, **more):
    write_report(study, tmp_path / "report.html", **more)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))
