"""MkDocs hooks: links from docs/ to other files of the repository, and the public names on the page of the API.

Pages link to files by relative paths that also work on GitHub. The files in `PAGES` become pages of the site. Any other
linked file outside docs/ (a table, a figure, a source file) is added under its path in the repository. A link to a file
that does not exist is left unchanged, so that `mkdocs build --strict` reports it.
"""

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent
# Page of the site: file of the repository. All other pages are files of docs/.
PAGES = {
    "index.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "results/reference/README.md": "results/reference/README.md",
}
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(?=[)\s])")


def _target(page, link):
    """Path from the repository's root of a link on a page of the site."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(PAGES.get(page, f"docs/{page}")), link))


def _in_site(path):
    """Path within the site's sources of a file of the repository; docs/ is its root, README.md its first page."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def on_files(files, config):
    """Add `PAGES` and every file that a page links to."""
    for page, path in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    for file in files.documentation_pages():
        for match in LINK.finditer(file.content_string):
            path = _target(file.src_uri, match[2])
            known = files.get_file_from_path(_in_site(path)) is not None or path.startswith("..")
            if not known and (ROOT / path).is_file():
                source = str(ROOT / path)
                files.append(File.generated(config, path, abs_src_path=source, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links into paths between sources of the site, and public names into the modules that define them."""
    here = page.file.src_uri
    if here == "api.md":
        for name, module in _public().items():
            markdown = re.sub(rf"^::: correctnet\.{name}$", f"::: correctnet.{module}.{name}", markdown, flags=re.M)

    def within_site(match):
        target = _in_site(_target(here, match[2]))
        return f"{match[1]}{posixpath.relpath(target, posixpath.dirname(here) or '.')}{match[3] or ''}"

    return LINK.sub(within_site, markdown)


def _public():
    """The dictionary `_PUBLIC` of correctnet/__init__.py, public name to module, without importing the package."""
    for node in ast.parse((ROOT / "correctnet/__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "_PUBLIC":
            return ast.literal_eval(node.value)
    raise ValueError("correctnet/__init__.py does not assign _PUBLIC")
