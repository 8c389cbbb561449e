"""Figures inside a page: in the page's colours, with names of their own and a text for those who do not see them."""

import re
import xml.etree.ElementTree as ElementTree

from markupsafe import Markup

from pykd._svg import LOOKS

SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}href"
# The page's style says what these are on a light and on a dark ground.
COLOURS = {colour.lower(): f"var(--look-{number})" for number, (colour, _) in enumerate(LOOKS)}
COLOURS |= {"#000000": "currentColor", "#b0b0b0": "var(--line)", "#ffffff": "none"}


def inlined(svg: bytes, name: str, text: str) -> Markup:
    """A figure of :mod:`pykd.report.figures` as an element of a page.

    Args:
        svg: the file.
        name: begins every id in it: two figures of a page must not share one.
        text: what the figure tells, in words.

    Example:
        >>> inlined(b'<svg xmlns="http://www.w3.org/2000/svg"><path id="a" style="fill: #000000"/></svg>', "f1", "Dots")
        Markup('<svg role="img" aria-label="Dots"><path id="f1-a" style="fill: currentColor" /></svg>')
    """
    root = ElementTree.fromstring(svg)
    for child in [*root.findall(f"{SVG}metadata"), *root.findall(f"{SVG}defs[{SVG}style]")]:
        root.remove(child)  # the page has this style
    root.attrib.pop("version", None)
    root.attrib |= {"role": "img", "aria-label": text}
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        element.tail = None
        if element.tag != "text":
            element.text = None
        own = element.attrib
        if (link := own.pop(XLINK, None)) is not None:
            own["href"] = f"#{name}-{link[1:]}" if link.startswith("#") else link
        if "id" in own:
            own["id"] = f"{name}-{own['id']}"
        if "clip-path" in own:
            own["clip-path"] = own["clip-path"].replace("url(#", f"url(#{name}-")
        if "style" in own:
            style = re.sub(r" ?font-family: [^;]+;?", "", own["style"])
            own["style"] = re.sub(r"#[0-9a-f]{6}", lambda found: COLOURS.get(found[0], found[0]), style)
        if "d" in own:
            own["d"] = re.sub(r"(\.\d\d)\d+", r"\1", own["d"].replace("\n", ""))
    return Markup(ElementTree.tostring(root, encoding="unicode"))
