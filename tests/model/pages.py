"""Pages of a paper that does not exist, on which the released model is tried. Nothing here is trained on."""

from collections.abc import Sequence

from copydesk import Page

MENU = "".join(f"<li><a href='/{word.lower()}'>{word}</a></li>" for word in "World Business Sport Opinion".split())
PAGE = """<html><body>
<header><nav><ul>{menu}<li><a href='/subscribe'>Subscribe</a></li><li><a href='/login'>Sign in</a></li></ul></nav>
</header>
<main><article>
<h1>{headline}</h1>
<p class='byline'>By Ingrid Halloway</p><time>3 March 2026</time>
{body}
{extra}
</article></main>
<footer><ul><li><a href='/about'>About us</a></li><li><a href='/advertise'>Advertise with us</a></li>
<li><a href='/privacy'>Privacy policy</a></li></ul><p>© 2026 Tarn Valley Press. All rights reserved.</p></footer>
</body></html>"""


def paragraphs(text: str) -> tuple[str, ...]:
    """Return the paragraphs of a text, one line each."""
    return tuple(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))


HEADLINE = "Storvik and Kelland sign treaty on shared fishing waters"
BODY = paragraphs("""
The foreign ministers of Storvik and Kelland signed a treaty on Tuesday that ends nine years of quarrels over the
cod banks between the two countries.

Under the agreement, boats from both nations may fish the northern bank from April to September, and a joint
commission will set quotas each winter.

“Neither side got all it wanted, which is how we know it is a treaty,” Kelland’s foreign minister, Aurel Brandt,
told reporters at the signing in the port of Hvalnes.

The two governments had recalled their ambassadors in 2023, after a coastguard vessel cut the nets of a trawler.
Diplomats said that the embassies would open again within a month.

Fishermen’s unions in both countries gave the text a cautious welcome and asked for inspectors at every landing.
""")


def page_with(extra: str = "", *, headline: str = HEADLINE, body: Sequence[str] = BODY) -> str:
    """Return a page as HTML, with more HTML beneath the article."""
    return PAGE.format(menu=MENU, headline=headline, body="".join(f"<p>{text}</p>" for text in body), extra=extra)


def labels_of(page: Page) -> dict[str, str]:
    """Return the label of each text; of equal ones, the last one's."""
    return {section.text: str(section.label) for section in page.sections}
