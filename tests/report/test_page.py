import re

from report_cases import picture

from dybit.report import write_page
from dybit.report.histogram import to_svg


def test_page_is_one_file_and_escapes(tmp_path):
    path = tmp_path / "p.html"
    write_page(
        path, title="<b>", notes=["a & b"], svg=to_svg(picture()), columns=["name", ">dB"], rows=[("", ["<i>", "1"])]
    )
    text = path.read_text()
    assert "&lt;b&gt;" in text and "&lt;i&gt;" in text and "a &amp; b" in text and "<svg" in text
    assert not re.search(r"(src|href)=\"(?!#)", re.sub(r"xlink:href=\"#[^\"]*\"", "", text))
